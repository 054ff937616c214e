"""The streamed response of a call: formats deltas as server-sent events and sends them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from muxjax.errors import MuxError
from muxjax.outputs import Delta
from muxjax.serve.errors import api_error
from muxjax.serve.openai.generation import GenerationCall, cancel_on_disconnect
from muxjax.serve.openai.responses import usage_counts

DeltaFormatter = Callable[[int, Delta], list[dict[str, Any]]]
"""Formats a delta of the output with the given index. Each returned choice becomes one event."""

# `json.dumps` would build an encoder for every event.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class EventStream(Response):
    """Server-sent events: choices as they are generated, usage if requested, then `[DONE]`.

    An engine error is the last event, because the status has already been sent. The call is
    cancelled whenever the response ends, even before its first event.

    Args:
      call: the streams.
      header: the first fields of every event.
      format_delta: formats a delta.
      first_choices: choices that are sent before any delta.
      include_usage: whether a last event without choices has the token counts.
      uncounted: generated tokens per output to leave out of the usage.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        call: GenerationCall,
        header: dict[str, Any],
        format_delta: DeltaFormatter,
        *,
        first_choices: Sequence[dict[str, Any]] = (),
        include_usage: bool,
        uncounted: int = 0,
    ) -> None:
        # The base class would add a body and its `content-length`.
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._call = call
        self._header = {**header, "usage": None} if include_usage else header
        self._format_delta = format_delta
        self._first_choices = first_choices
        self._include_usage = include_usage
        self._uncounted = uncounted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response (ASGI)."""
        try:
            await cancel_on_disconnect(receive, self._send_all(send))
        except (ClientDisconnect, OSError):
            pass  # the client has disconnected; some ASGI servers raise OSError when sending
        finally:
            self._call.cancel()

    async def _send_all(self, send: Send) -> None:
        # Every event begins with the same fields, which are encoded once.
        prefix = "data: " + _encode(self._header).removesuffix("}") + ',"choices":['
        generated = 0

        async def send_text(text: str) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        async def send_delta(index: int, delta: Delta) -> None:
            nonlocal generated
            generated += len(delta.token_ids)
            for choice in self._format_delta(index, delta):
                await send_text(f"{prefix}{_encode(choice)}]}}\n\n")

        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        try:
            for choice in self._first_choices:
                await send_text(f"{prefix}{_encode(choice)}]}}\n\n")
            await self._call.read(send_delta)
        except MuxError as error:
            await send_text(f"data: {_encode(api_error(error).body)}\n\n")
        else:
            if self._include_usage:
                counted = generated - self._uncounted * len(self._call.streams)
                usage = usage_counts(self._call, counted)
                last = {**self._header, "choices": [], "usage": usage}
                await send_text(f"data: {_encode(last)}\n\n")
            await send_text("data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
