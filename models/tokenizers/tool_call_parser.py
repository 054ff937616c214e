"""Splits the output of a model into text and tool calls while it is generated.

The grammar of `chat_tools` guarantees the format that is parsed here.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from muxjax.models.tokenizers.chat_tools import ToolCallFormat


@dataclass
class FunctionCall:
    """A call of a function by the model.

    Attributes:
      name: name of the function.
      arguments: the arguments parsed so far, as JSON.
      id: unique id, to which the message with the call's result refers.
    """

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}", compare=False)


@dataclass(frozen=True)
class ParsedPiece:
    """A piece of an output: text, or a part of a call.

    Attributes:
      text: text of the message's content; empty for a part of a call.
      call: index of the call; None for content.
      started: the call, in its first piece only.
      arguments: further text of the call's arguments.
    """

    text: str = ""
    call: int | None = None
    started: FunctionCall | None = None
    arguments: str = ""


class ToolCallParser:
    """Parses one output.

    `flush` returns as content the text that was held back, and a call that ended before its
    arguments began.

    Args:
      call_format: format of the model's calls.

    Attributes:
      calls: the calls parsed so far; the last may be incomplete.
    """

    def __init__(self, call_format: ToolCallFormat) -> None:
        self._format = call_format
        self._state = "text"
        self._buffer = ""
        self._nesting = _Nesting()
        self._any_text = False
        self.calls: list[FunctionCall] = []

    def push(self, text: str) -> list[ParsedPiece]:
        """Parses further text and returns its pieces; holds back text that may begin a call."""
        self._buffer += text
        pieces: list[ParsedPiece] = []
        while self._step(pieces):
            pass
        return pieces

    def flush(self) -> list[ParsedPiece]:
        """The text that was held back; call it once, at the end of the output."""
        rest, self._buffer = self._buffer, ""
        if not rest or self._state in ("arguments", "closing", "between"):
            return []
        return [ParsedPiece(text=rest)]

    def _step(self, pieces: list[ParsedPiece]) -> bool:
        """Performs one transition of the parser; returns False if it needs more text."""
        return {
            "text": self._parse_text,
            "head": self._parse_head,
            "arguments": self._parse_arguments,
            "closing": self._parse_closing,
            "between": self._parse_between,
        }[self._state](pieces)

    def _parse_text(self, pieces: list[ParsedPiece]) -> bool:
        opening = self._format.opening
        if not self._format.has_delimiters:
            # A call is the whole output.
            if not self._any_text and self._buffer.startswith(opening):
                self._state = "head"
                return True
            if not self._any_text and opening.startswith(self._buffer):
                return False
            return self._emit_text(pieces, len(self._buffer))
        at = self._buffer.find(self._format.begin)
        if at >= 0:
            self._emit_text(pieces, at)
            if len(self._buffer) < len(opening):
                return False
            self._state = "head"
            return True
        held = _partial_marker(self._buffer, self._format.begin)
        return self._emit_text(pieces, len(self._buffer) - held)

    def _emit_text(self, pieces: list[ParsedPiece], size: int) -> bool:
        if size:
            pieces.append(ParsedPiece(text=self._buffer[:size]))
            self._buffer = self._buffer[size:]
            self._any_text = True
        return False

    def _parse_head(self, pieces: list[ParsedPiece]) -> bool:
        at = self._buffer.find(self._format.middle)
        if at < 0:
            return False
        call = FunctionCall(self._buffer[len(self._format.opening) : at])
        self.calls.append(call)
        pieces.append(ParsedPiece(call=len(self.calls) - 1, started=call))
        self._buffer = self._buffer[at + len(self._format.middle) :]
        self._nesting = _Nesting()
        self._state = "arguments"
        return True

    def _parse_arguments(self, pieces: list[ParsedPiece]) -> bool:
        size = self._nesting.scan(self._buffer)
        if size:
            part, self._buffer = self._buffer[:size], self._buffer[size:]
            self.calls[-1].arguments += part
            pieces.append(ParsedPiece(call=len(self.calls) - 1, arguments=part))
        if not self._nesting.closed:
            return False
        self._state = "closing"
        return True

    def _parse_closing(self, pieces: list[ParsedPiece]) -> bool:
        size = len(self._format.closing)
        if len(self._buffer) < size:
            return False
        self._buffer = self._buffer[size:]
        self._state = "between"
        return True

    def _parse_between(self, pieces: list[ParsedPiece]) -> bool:
        opening = "\n" + self._format.opening
        if len(self._buffer) < len(opening):
            return False
        self._buffer = self._buffer[1:]
        self._state = "head"
        return True


class _Nesting:
    """Finds the end of a JSON object that arrives in parts."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.closed = False

    def scan(self, text: str) -> int:
        """Number of leading characters that belong to the object."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.closed = True
                    return at + 1
        return len(text)


def _partial_marker(text: str, marker: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `marker`."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-size:]):
            return size
    return 0
