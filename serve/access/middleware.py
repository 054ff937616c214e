"""ASGI middleware in front of all endpoints: request id, access checks, key limits, log and trace.

The checks run in this order, before the body is read:

1. The call gets its `x-request-id`: the client's, if it is printable ASCII.
2. While the server drains, all paths except health and metrics get 503.
3. The `Host` and `Origin` headers are checked (`origins.py`).
4. The caller is authenticated and must have the right that the path requires (`callers.py`).
5. A call with the right `generate` counts against the limits of its key.
6. The body must arrive within `body_timeout`.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from muxjax.config.server import ServerConfig
from muxjax.serve import logs
from muxjax.serve.access.admission import Admission, FleetView
from muxjax.serve.access.callers import ANONYMOUS, Authenticator, is_public, required_right
from muxjax.serve.access.keys import Keys
from muxjax.serve.access.limits import KeyLimits
from muxjax.serve.access.origins import check_host, check_origin
from muxjax.serve.body import receive_within
from muxjax.serve.errors import CLIENT_CLOSED_REQUEST, ApiError, error_response
from muxjax.serve.tracing import Tracing

_SERVED_WHILE_DRAINING = frozenset({"/health", "/health/ready", "/metrics"})
_TRACE_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.prompt_tokens",
    "cached_tokens": "gen_ai.usage.cached_tokens",
    "output_tokens": "gen_ai.usage.completion_tokens",
    "ttft": "gen_ai.latency.time_to_first_token",
}
"""Names of span attributes by measurement, as in vLLM."""


@runtime_checkable
class CallObserver(Protocol):
    """Receives the beginning and the end of every HTTP call."""

    def on_call_start(self) -> None:
        """A call began."""
        ...

    def on_call_end(self, status: int) -> None:
        """A call ended with this HTTP status."""
        ...


@dataclass
class RequestMiddleware:
    """ASGI middleware that checks access, and logs and traces every call.

    Attributes:
      app: the wrapped ASGI application.
      admission: builds the fleet view of each call.
      keys: API keys; with none, every call is permitted.
      config: limits and timeouts.
      observer: receives every call.
      local_only: whether the server listens on a loopback address.
      tracing: exports a span for each call; None for no tracing.
    """

    app: ASGIApp
    admission: Admission
    keys: Keys
    config: ServerConfig
    observer: CallObserver
    local_only: bool
    tracing: Tracing | None = None

    def __post_init__(self) -> None:
        self._authenticator = Authenticator(self.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        call = _HttpCall(scope, _request_id(headers), send)
        token = logs.request_id.set(call.request_id)
        self.observer.on_call_start()
        try:
            with call.span(self.tracing, headers):
                await self._handle(scope, headers, receive, call)
        finally:
            self.observer.on_call_end(call.status)
            call.log()
            logs.request_id.reset(token)

    async def _handle(
        self, scope: Scope, headers: Headers, receive: Receive, call: _HttpCall
    ) -> None:
        with contextlib.ExitStack() as stack:
            try:
                limits = self._check_access(scope, headers, call)
                if limits is not None:
                    limits.enter()
                    stack.callback(limits.leave)
            except ApiError as error:
                await error_response(error)(scope, receive, call.send)
                return
            call.view = self.admission.fleet_view(call.caller.key, call.caller.limits)
            scope.setdefault("state", {}).update(caller=call.caller, view=call.view)
            receive = receive_within(receive, self.config.body_timeout)
            await self.app(scope, receive, call.send)

    def _check_access(self, scope: Scope, headers: Headers, call: _HttpCall) -> KeyLimits | None:
        """Sets the caller and returns the limits that the call counts against, if any."""
        path = scope["path"]
        if path not in _SERVED_WHILE_DRAINING:
            self.admission.check_not_draining()
        if self.local_only and not len(self.keys):
            check_host(headers, self.config)
        check_origin(headers, self.config)
        if is_public(path):
            return None
        call.caller = self._authenticator.authenticate(headers)
        right = required_right(scope["method"], path)
        if right is not None:
            call.caller.require(right)
        return call.caller.limits if right == "generate" else None


class _HttpCall:
    """One HTTP call: adds the request id to its response, and logs and traces it."""

    def __init__(self, scope: Scope, request_id: str, send: Send) -> None:
        self.request_id = request_id
        self.caller = ANONYMOUS
        self.view: FleetView | None = None
        self.status = CLIENT_CLOSED_REQUEST  # until a response starts
        self._method = scope["method"]
        self._path = scope["path"]
        self._send = send
        self._started = time.monotonic()

    async def send(self, message: Message) -> None:
        """Records the status, adds headers and forwards the message to ASGI `send`."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    def log(self) -> None:
        """Logs the call, without its prompt and output."""
        quiet = self.status < 400 and (self._method == "GET" or is_public(self._path))
        logs.event(
            "request",
            logging.DEBUG if quiet else logging.INFO,
            method=self._method,
            path=self._path,
            status=self.status,
            seconds=round(time.monotonic() - self._started, 4),
            key=self.caller.key.name if self.caller.key else None,
            **self._measurements(),
        )

    @contextlib.contextmanager
    def span(self, tracing: Tracing | None, headers: Headers) -> Iterator[None]:
        """Exports the call as a span of the client's trace, if tracing is on."""
        if tracing is None:
            yield
            return
        with tracing.span(f"{self._method} {self._path}", dict(headers)) as attributes:
            try:
                yield
            finally:
                attributes["gen_ai.request.id"] = self.request_id
                attributes["http.response.status_code"] = self.status
                for name, value in self._measurements().items():
                    attributes[_TRACE_ATTRIBUTES[name]] = value

    def _measurements(self) -> dict[str, str | int | float]:
        return {} if self.view is None else self.view.measurements()


def _request_id(headers: Headers) -> str:
    client_id = headers.get("x-request-id", "")
    valid = 0 < len(client_id) <= 128 and client_id.isascii() and client_id.isprintable()
    return client_id if valid else f"req-{uuid.uuid4().hex}"
