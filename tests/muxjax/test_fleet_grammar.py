"""Outputs under a grammar, of tiny random models, which follow it by the mask only."""

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
    with Fleet.load(fleet("llama"), poison=True) as found:
        yield found
        stats = found.stats()["models"]
        assert all(model["kv_pages_used"] == 0 for model in stats.values())


def of_schema(schema: Any, **more: Any) -> SamplingParams:
    return dataclasses.replace(LONG, grammar=Grammar.json_schema(schema), **more)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_outputs_are_valid_under_their_schemas(loaded: Fleet, temperature: float) -> None:
    """All schemas at once, twice each, among requests without a grammar."""
    names = [name for name in SCHEMAS for _ in range(2)]
    each = [
        of_schema(SCHEMAS[name], temperature=temperature, seed=index)
        for index, name in enumerate(names)
    ]
    free = [dataclasses.replace(LONG, max_tokens=30, seed=7, ignore_eos=True)] * 3
    alone = loaded.generate("llama", "free", free[:1])[0]
    answers = loaded.generate("llama", ["x"] * len(each) + ["free"] * 3, each + free)
    for name, answer in zip(names, answers, strict=False):
        assert answer.finish_reason == "stop", (name, answer.text)
        jsonschema.validate(json.loads(answer.text), SCHEMAS[name])
    assert [answer.token_ids for answer in answers[-3:]] == [alone.token_ids] * 3


def test_a_seed_gives_the_same_alone_and_among_others(loaded: Fleet) -> None:
    params = [of_schema(SCHEMAS["object"], seed=seed) for seed in range(4)]
    together = loaded.generate("llama", ["abc"] * 4, params)
    assert [loaded.generate("llama", "abc", one)[0] for one in params] == together
    assert len({answer.text for answer in together}) == 4


def test_greedy_is_the_likeliest_allowed_token(loaded: Fleet) -> None:
    params = of_schema({"enum": ["aaaa", "bbbb", "cccc"]}, temperature=0.0, logprobs=20)
    answer = loaded.generate("llama", "abc", params)[0]
    assert json.loads(answer.text) in ("aaaa", "bbbb", "cccc")
    assert answer.logprobs is not None
    letter = answer.logprobs[1]
    likely = dict(letter.top)
    for other in b"abc":
        assert likely.get(other, -99.0) <= letter.logprob + 1e-6


def test_preemption_changes_nothing() -> None:
    """Six requests in a pool for two: greedy and sampled outputs are as isolated ones."""
    config = entry("llama")
    config["max_model_len"] = 96
    small = {**fleet("llama", memory="320KB"), "models": [config]}
    with Fleet.load(small, poison=True) as loaded:
        params = [
            of_schema(
                SCHEMAS["object"],
                seed=index,
                temperature=float(index % 2),
                max_tokens=80,
                logit_bias=dict.fromkeys(b" \n\r\t", -30.0),
            )
            for index in range(4)
        ]
        free = SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True)
        alone = [loaded.generate("llama", "ab", one)[0] for one in [*params, free]]
        together = loaded.generate("llama", ["ab"] * 6, [*params, free, free])
        stats = loaded.stats()["models"]["llama"]
    assert stats["preemptions"] > 0
    assert together == [*alone, alone[-1]]
    for answer in together[:4]:
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMAS["object"])


def test_an_end_token_ends_what_may_end(loaded: Fleet) -> None:
    biased = of_schema({"type": "integer"}, logit_bias={256: 100.0}, temperature=0.0)
    answer = loaded.generate("llama", "a", biased)[0]
    assert (len(answer.text), answer.token_ids[-1], answer.finish_reason) == (1, 256, "stop")
    unending = dataclasses.replace(biased, ignore_eos=True, max_tokens=9)
    answer = loaded.generate("llama", "a", unending)[0]
    assert (len(answer.text), answer.finish_reason) == (9, "length")
    assert answer.text.isdigit()


def test_streams_and_stop_strings(loaded: Fleet) -> None:
    params = of_schema({"type": "array", "items": {"const": 7}, "minItems": 5}, stop=[","])
    text = "".join(delta.text for delta in loaded.stream("llama", "a", params))
    assert text.split() == ["[", "7"] or text.strip() == "[7"


def test_refusals(loaded: Fleet) -> None:
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        loaded.generate("llama", "a", of_schema({"type": "array", "uniqueItems": True}))
    with pytest.raises(InvalidRequest, match="min_tokens cannot"):
        of_schema(True, min_tokens=3)
