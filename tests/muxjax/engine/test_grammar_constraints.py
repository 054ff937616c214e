"""Grammars with a byte vocabulary: allowed tokens, rejected grammars, end of output."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from muxjax.engine.grammar_constraints import ConstraintCompiler, GrammarConstraint
from muxjax.errors import InvalidRequest
from muxjax.grammar import MAX_GRAMMAR_CHARS, Grammar
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer

VOCAB = 301
EOS = 256
BYTES = ConstraintCompiler(byte_tokenizer(VOCAB), VOCAB)


def start(grammar: Grammar, ends: tuple[int, ...] = (EOS,)) -> GrammarConstraint:
    return BYTES.compile(grammar, ends)


def allowed(constraint: GrammarConstraint) -> set[int]:
    bits = np.unpackbits(constraint.mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def follow(grammar: Grammar, text: str) -> tuple[int, bool]:
    """Returns the number of accepted bytes, and whether the output may end there."""
    constraint = start(grammar)
    for at, byte in enumerate(text.encode()):
        if byte not in allowed(constraint):
            return at, EOS in allowed(constraint)
        if constraint.advance(byte):
            return at + 1, True
    return len(text.encode()), EOS in allowed(constraint)


@pytest.mark.parametrize(
    ("grammar", "text", "accepted", "ends"),
    [
        (Grammar.regex("[0-9]{2,3}"), "12", 2, True),
        (Grammar.regex("[0-9]{2,3}"), "1", 1, False),
        (Grammar.regex("[0-9]{2,3}"), "1234", 3, True),
        (Grammar.json_object(), '{"a": [1, null]}', 16, True),
        (Grammar.json_object(), "[1]", 0, False),
        (Grammar.json_schema(True), "[1]", 3, True),
        (Grammar.json_schema({"type": "integer"}), "-7", 2, True),
        (Grammar.json_schema({"enum": ["é", 2]}), '"é"', 4, True),
        (Grammar.json_schema({"type": "object"}), "{" + " " * 20 + "}", 22, True),
        (Grammar.json_schema({"type": "object"}), "{" + " " * 21 + "}", 21, False),
        (Grammar.json_schema({"type": "object", "minProperties": 1}), "{}", 1, False),
        (Grammar.json_schema({"type": "object", "maxProperties": 1}), '{"a":1,', 6, False),
        (Grammar.json_schema({"const": 1.5}), "1.5", 3, True),
        (Grammar.lark('start: "a" | "b" start'), "bba", 3, True),
    ],
)
def test_grammar_accepts_the_expected_prefix(
    grammar: Grammar, text: str, accepted: int, ends: bool
) -> None:
    assert follow(grammar, text) == (accepted, ends)


def test_tokens_without_text_and_end_tokens_are_not_allowed_as_text() -> None:
    constraint = start(Grammar.regex("(.|\n)*"))
    assert allowed(constraint) == {*range(0x80), *range(0xC2, 0xF5), EOS}
    newline = start(Grammar.regex("a\nb"), (ord("\n"),))
    constraint = start(Grammar.regex("[a\n]+"), (ord("\n"),))
    assert allowed(constraint) == {ord("a")}
    assert not constraint.advance(ord("a"))
    assert allowed(constraint) == {ord("a"), ord("\n")}
    with pytest.raises(InvalidRequest, match="no token with which"):
        newline.advance(ord("a"))


def test_output_without_end_tokens_ends_when_the_grammar_is_complete() -> None:
    constraint = start(Grammar.regex("ab?"), ())
    assert not constraint.advance(ord("a"))
    assert allowed(constraint) == {ord("b")}
    assert constraint.advance(ord("b"))


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match="cannot be used"):
        start(Grammar.regex("a")).advance(ord("b"))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
        ({"type": "strin"}, "strin"),
        ({"type": "string", "format": "nonsense"}, "nonsense"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "not present"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"enum": []}, "nsatisfiable"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "required"),
    ],
)
def test_schemas_that_cannot_be_enforced_are_rejected(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        start(Grammar.json_schema(schema))
    assert caught.value.field == "grammar"
    assert "\n" not in str(caught.value)


def test_invalid_and_oversized_grammars_are_rejected() -> None:
    with pytest.raises(InvalidRequest):
        start(Grammar.lark("start"))
    with pytest.raises(InvalidRequest, match="at most"):
        Grammar.regex("a" * (MAX_GRAMMAR_CHARS + 1))
    with pytest.raises(InvalidRequest):
        start(Grammar("json_schema", '{"anyOf":' * 300 + "{}" + "}" * 300))


def test_grammar_that_the_vocabulary_cannot_express_is_rejected() -> None:
    digits = ConstraintCompiler(byte_tokenizer(64), 64)  # no braces

    def write() -> None:
        constraint = digits.compile(Grammar.json_object(), ())
        constraint.advance(min(allowed(constraint)))

    with pytest.raises(InvalidRequest, match="grammar"):
        write()
    assert digits.compile(Grammar.json_schema({"type": "integer"}), ()).mask.any()


def test_masks_are_not_changed_by_advancing() -> None:
    constraint = start(Grammar.json_schema({"const": "ab"}))
    before = constraint.mask
    copy = before.copy()
    constraint.advance(ord('"'))
    np.testing.assert_array_equal(before, copy)
    assert json.loads('"ab"') == "ab"


def test_replayed_constraint_continues_after_the_tokens():
    first = start(Grammar.regex("[0-9]{2,3}x"))
    first.advance(ord("1"))
    replayed = first.replay([ord("4"), ord("5"), ord("6")])
    assert allowed(replayed) == {ord("x")}
    assert allowed(first) == {*b"0123456789"}
    with pytest.raises(InvalidRequest):
        first.replay([ord("x")])
