"""Parsing of tool calls from text that arrives in pieces of any size."""

from __future__ import annotations

import pytest

from muxjax.models.tokenizers.chat_tools import ToolCallFormat
from muxjax.models.tokenizers.tool_call_parser import ParsedPiece, ToolCallParser

TAGGED = ToolCallFormat("<tool_call>\n", "\n</tool_call>", "arguments", True)
BARE = ToolCallFormat("", "", "parameters", True)
ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{"}}\n</tool_call>'
TWO = '<tool_call>\n{"name": "g_2", "arguments": {}}\n</tool_call>'
BARE_CALL = '{"name": "f", "parameters": {"a": [{}]}}'


def parse(
    call_format: ToolCallFormat, text: str, size: int
) -> tuple[str, list[tuple[str, str]], list[ParsedPiece]]:
    parser = ToolCallParser(call_format)
    pieces: list[ParsedPiece] = []
    for start in range(0, len(text), size):
        pieces += parser.push(text[start : start + size])
    pieces += parser.flush()
    content = "".join(piece.text for piece in pieces)
    return content, [(call.name, call.arguments) for call in parser.calls], pieces


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 1000])
@pytest.mark.parametrize(
    ("call_format", "text", "content", "calls"),
    [
        (TAGGED, "hello <tool", "hello <tool", []),
        (TAGGED, "a < b <tool_call> c", "a < b <tool_call> c", []),
        (TAGGED, ONE, "", [("f", '{"a": "}\\"{"}')]),
        (TAGGED, f"Let me see.\n{ONE}", "Let me see.\n", [("f", '{"a": "}\\"{"}')]),
        (TAGGED, f"{ONE}\n{TWO}", "", [("f", '{"a": "}\\"{"}'), ("g_2", "{}")]),
        (TAGGED, ONE[:60], "", [("f", '{"a": "}\\"{"}')]),
        (TAGGED, ONE[: ONE.index("}")], "", [("f", '{"a": "')]),
        (TAGGED, ONE[:20], ONE[:20], []),
        (TAGGED, ONE[:14], ONE[:14], []),
        (TAGGED, "", "", []),
        (BARE, BARE_CALL, "", [("f", '{"a": [{}]}')]),
        (BARE, "hi " + BARE_CALL, "hi " + BARE_CALL, []),
        (BARE, '{"nam', '{"nam', []),
        (BARE, "hello", "hello", []),
    ],
)
def test_parser_splits_text_and_calls(
    call_format: ToolCallFormat, text: str, content: str, calls: list[tuple[str, str]], size: int
) -> None:
    parsed_content, parsed_calls, pieces = parse(call_format, text, size)
    assert parsed_content == content
    assert parsed_calls == calls
    for index, (name, arguments) in enumerate(calls):
        call_pieces = [piece for piece in pieces if piece.call == index]
        assert call_pieces[0].started is not None
        assert call_pieces[0].started.name == name
        assert not any(piece.started for piece in call_pieces[1:])
        assert "".join(piece.arguments for piece in call_pieces) == arguments


def test_call_ids_are_unique() -> None:
    parser = ToolCallParser(TAGGED)
    parser.push(f"{ONE}\n{TWO}")
    first, second = (call.id for call in parser.calls)
    assert first != second
    assert first.startswith("call_")
