"""Outputs of tiny random models under a grammar, which only the mask enforces."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from muxjax import Fleet, SamplingParams
from muxjax.errors import InvalidRequest
from muxjax.grammar import Grammar
from tests.muxjax.tiny_fleets import entry, fleet

SCHEMAS: dict[str, Any] = {
    "integer": {"type": "integer", "minimum": -20, "maximum": 120},
    "string": {"type": "string", "minLength": 2, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]{2}$"},
    "date": {"type": "string", "format": "date"},
    "enum": {"enum": ["red", "grün", 3, None, {"a": [1]}]},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"const": "x"}], "items": False,
              "minItems": 2},
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "union": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
    "references": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "left": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]},
                },
                "required": ["value", "left"],
                "additionalProperties": False,
            },
            "leaf": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    },
}  # fmt: skip
LONG = SamplingParams(max_tokens=200)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Fleet]:
    with Fleet.load(fleet("llama"), poison=True) as llama:
        yield llama
        stats = llama.stats()["models"]
        assert all(model["kv_pages_used"] == 0 for model in stats.values())


def schema_params(schema: Any, **fields: Any) -> SamplingParams:
    return dataclasses.replace(LONG, grammar=Grammar.json_schema(schema), **fields)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_outputs_are_valid_under_their_schemas(loaded: Fleet, temperature: float) -> None:
    """Two concurrent requests for each schema, and some without a grammar."""
    names = [name for name in SCHEMAS for _ in range(2)]
    constrained = [
        schema_params(SCHEMAS[name], temperature=temperature, seed=index)
        for index, name in enumerate(names)
    ]
    free = [dataclasses.replace(LONG, max_tokens=30, seed=7, ignore_eos=True)] * 3
    isolated = loaded.generate("llama", "free", free[:1])[0]
    prompts = ["x"] * len(constrained) + ["free"] * 3
    answers = loaded.generate("llama", prompts, constrained + free)
    for name, answer in zip(names, answers, strict=False):
        assert answer.finish_reason == "stop", (name, answer.text)
        jsonschema.validate(json.loads(answer.text), SCHEMAS[name])
    assert [answer.token_ids for answer in answers[-3:]] == [isolated.token_ids] * 3


def test_seeded_outputs_do_not_depend_on_the_batch(loaded: Fleet) -> None:
    params = [schema_params(SCHEMAS["object"], seed=seed) for seed in range(4)]
    batched = loaded.generate("llama", ["abc"] * 4, params)
    assert [loaded.generate("llama", "abc", single)[0] for single in params] == batched
    assert len({answer.text for answer in batched}) == 4


def test_greedy_selects_the_most_likely_allowed_token(loaded: Fleet) -> None:
    params = schema_params({"enum": ["aaaa", "bbbb", "cccc"]}, temperature=0.0, logprobs=20)
    answer = loaded.generate("llama", "abc", params)[0]
    assert json.loads(answer.text) in ("aaaa", "bbbb", "cccc")
    assert answer.logprobs is not None
    letter = answer.logprobs[1]
    top = dict(letter.top)
    for other in b"abc":
        assert top.get(other, -99.0) <= letter.logprob + 1e-6


def test_preemption_does_not_change_outputs() -> None:
    """Six concurrent requests in a pool for two have the same outputs as isolated ones."""
    config = entry("llama")
    config["max_model_len"] = 96
    small = {**fleet("llama", memory="320KB"), "models": [config]}
    with Fleet.load(small, poison=True) as loaded:
        params = [
            schema_params(
                SCHEMAS["object"],
                seed=index,
                temperature=float(index % 2),
                max_tokens=80,
                logit_bias=dict.fromkeys(b" \n\r\t", -30.0),
            )
            for index in range(4)
        ]
        free = SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True)
        isolated = [loaded.generate("llama", "ab", single)[0] for single in [*params, free]]
        concurrent = loaded.generate("llama", ["ab"] * 6, [*params, free, free])
        stats = loaded.stats()["models"]["llama"]
    assert stats["preemptions"] > 0
    assert concurrent == [*isolated, isolated[-1]]
    for answer in concurrent[:4]:
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMAS["object"])


def test_an_end_token_ends_a_complete_output(loaded: Fleet) -> None:
    biased = schema_params({"type": "integer"}, logit_bias={256: 100.0}, temperature=0.0)
    answer = loaded.generate("llama", "a", biased)[0]
    assert (len(answer.text), answer.token_ids[-1], answer.finish_reason) == (1, 256, "stop")
    without_eos = dataclasses.replace(biased, ignore_eos=True, max_tokens=9)
    answer = loaded.generate("llama", "a", without_eos)[0]
    assert (len(answer.text), answer.finish_reason) == (9, "length")
    assert answer.text.isdigit()


def test_stop_strings_end_constrained_streams(loaded: Fleet) -> None:
    params = schema_params({"type": "array", "items": {"const": 7}, "minItems": 5}, stop=[","])
    text = "".join(delta.text for delta in loaded.stream("llama", "a", params))
    assert text.split() == ["[", "7"] or text.strip() == "[7"


def test_unsupported_schemas_and_parameters_are_rejected(loaded: Fleet) -> None:
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        loaded.generate("llama", "a", schema_params({"type": "array", "uniqueItems": True}))
    with pytest.raises(InvalidRequest, match="min_tokens cannot"):
        schema_params(True, min_tokens=3)
