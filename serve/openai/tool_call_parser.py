"""Reads text and calls from an answer as it grows; the grammar of `tool_calls.py` has made it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from muxjax.serve.openai.tool_calls import CallForm


@dataclass
class Call:
    """A call as far as it has been read."""

    id: str
    name: str
    arguments: str = ""


@dataclass(frozen=True)
class Piece:
    """What some more text has brought: text for people, or a part of a call.

    Attributes:
      text: content; empty for a part of a call.
      call: the index of the call, None for content.
      started: the call, in its first piece.
      arguments: more of its arguments.
    """

    text: str = ""
    call: int | None = None
    started: Call | None = None
    arguments: str = ""


class CallReader:
    """Splits an answer into content and calls.

    Nothing is lost: what was held back, and a call that was cut off before its arguments began,
    come out as content at the end.

    Args:
      form: how the model writes calls.
    """

    def __init__(self, form: CallForm) -> None:
        self._form = form
        self._state = "text"
        self._buffer = ""
        self._nesting = _Nesting()
        self._any_text = False
        self.calls: list[Call] = []

    def push(self, text: str) -> list[Piece]:
        """What this text brings; texts that may begin a call are held back."""
        self._buffer += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """What is left at the end."""
        left, self._buffer = self._buffer, ""
        if not left or self._state in ("arguments", "closing", "between"):
            return []
        return [Piece(text=left)]

    def _step(self, pieces: list[Piece]) -> bool:
        """One move of the reader; False if more text is needed."""
        return {
            "text": self._read_text,
            "head": self._read_head,
            "arguments": self._read_arguments,
            "closing": self._read_closing,
            "between": self._read_between,
        }[self._state](pieces)

    def _read_text(self, pieces: list[Piece]) -> bool:
        opening = self._form.opening
        if not self._form.many:
            # A call is the whole answer.
            if not self._any_text and self._buffer.startswith(opening):
                self._state = "head"
                return True
            if not self._any_text and opening.startswith(self._buffer):
                return False
            return self._give(pieces, len(self._buffer))
        at = self._buffer.find(self._form.begin)
        if at >= 0:
            self._give(pieces, at)
            if len(self._buffer) < len(opening):
                return False
            self._state = "head"
            return True
        return self._give(pieces, len(self._buffer) - _held(self._buffer, self._form.begin))

    def _give(self, pieces: list[Piece], size: int) -> bool:
        if size:
            pieces.append(Piece(text=self._buffer[:size]))
            self._buffer = self._buffer[size:]
            self._any_text = True
        return False

    def _read_head(self, pieces: list[Piece]) -> bool:
        at = self._buffer.find(self._form.middle)
        if at < 0:
            return False
        call = Call(f"call_{uuid.uuid4().hex[:24]}", self._buffer[len(self._form.opening) : at])
        self.calls.append(call)
        pieces.append(Piece(call=len(self.calls) - 1, started=call))
        self._buffer = self._buffer[at + len(self._form.middle) :]
        self._nesting = _Nesting()
        self._state = "arguments"
        return True

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        size = self._nesting.read(self._buffer)
        if size:
            part, self._buffer = self._buffer[:size], self._buffer[size:]
            self.calls[-1].arguments += part
            pieces.append(Piece(call=len(self.calls) - 1, arguments=part))
        if not self._nesting.closed:
            return False
        self._state = "closing"
        return True

    def _read_closing(self, pieces: list[Piece]) -> bool:
        size = len(self._form.closing)
        if len(self._buffer) < size:
            return False
        self._buffer = self._buffer[size:]
        self._state = "between"
        return True

    def _read_between(self, pieces: list[Piece]) -> bool:
        opening = "\n" + self._form.opening
        if len(self._buffer) < len(opening):
            return False
        self._buffer = self._buffer[1:]
        self._state = "head"
        return True


class _Nesting:
    """Finds the end of a JSON object in parts."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = False
        self._escaped = False
        self.closed = False

    def read(self, text: str) -> int:
        """How many of these characters are the object's."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._string:
                self._escaped = char == "\\"
                self._string = char != '"'
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.closed = True
                    return at + 1
        return len(text)


def _held(text: str, marker: str) -> int:
    """How many of the last characters may be the beginning of `marker`."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-size:]):
            return size
    return 0
