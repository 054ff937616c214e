"""Structured output: a JSON Schema, a regular expression or a grammar for the output.

A grammar is data; `muxjax.engine.grammar_constraints` compiles it into masks of the allowed next
tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from muxjax.errors import InvalidRequest

MAX_GRAMMAR_CHARS = 128 * 1024
"""Maximum length of a grammar's text, in characters."""


@dataclass(frozen=True)
class Grammar:
    """The form that an output must have.

    Attributes:
      kind: the format of `text`.
      text: a JSON Schema as JSON, a regular expression, or a grammar in llguidance's Lark syntax.

    Raises:
      InvalidRequest: the text is too long.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    def __post_init__(self) -> None:
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest(
                f"the grammar has {len(self.text)} characters; at most {MAX_GRAMMAR_CHARS}",
                field="grammar",
            )

    @staticmethod
    def json_schema(schema: Mapping[str, Any] | bool) -> Grammar:
        """JSON that is valid under a schema."""
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        return Grammar("json_schema", json.dumps(schema))

    @staticmethod
    def json_object() -> Grammar:
        """Any JSON object."""
        return Grammar.json_schema({"type": "object"})

    @staticmethod
    def regex(pattern: str) -> Grammar:
        """Text that fully matches a regular expression (Rust's syntax, no look-around)."""
        return Grammar("regex", pattern)

    @staticmethod
    def lark(text: str) -> Grammar:
        """Text that matches a context-free grammar in llguidance's Lark syntax."""
        return Grammar("lark", text)
