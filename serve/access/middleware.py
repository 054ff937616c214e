"""What every call passes before it reaches an endpoint: id, origin, key, limits, log.

In this order, as plain ASGI middleware, so that nothing is read of a body that is not let in:

1. The call gets its `x-request-id`, the client's own if it is printable.
2. A server that stops answers 503 to everything but health.
3. A page of another origin may not call (`cors_origins` says which may), so that no web page can
   use a server on its reader's own machine; nor may one that has given that machine a name of its
   own (DNS rebinding): a server without keys on a loopback address answers to `localhost` and
   addresses only.
4. The key is found, and has to have the right that the path needs.
5. A call that makes something counts against the key's limits.
6. The body has to arrive in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from muxjax.config.server import ServerConfig
from muxjax.serve.access.admission import Admission, View
from muxjax.serve.access.keys import Key, Keys, Right
from muxjax.serve.access.limits import KeyLimits
from muxjax.serve.errors import ApiError, error_response
from muxjax.serve import logs
from muxjax.serve.tracing import Tracing

_OPEN_PREFIXES = ("/page/",)
_ADMIN_PREFIXES = ("/models/", "/fleet/")
_OPEN = frozenset({"/", "/health", "/health/ready", "/openapi.json", "/favicon.ico"})
"""What needs no key: it tells nothing about models or users."""
_ALWAYS = frozenset({"/health", "/health/ready", "/metrics"})
"""What a server that stops still answers."""


@dataclass(frozen=True)
class Caller:
    """Who calls. Without keys everybody may everything, and `key` is None."""

    key: Key | None
    limits: KeyLimits | None

    def may(self, right: Right) -> bool:
        """Whether it has a right."""
        return self.key is None or right in self.key.rights

    def require(self, right: Right) -> None:
        """Refuses a caller that lacks a right.

        Raises:
          ApiError: 403.
        """
        if not self.may(right):
            raise ApiError(f"this key may not: it lacks the right {right!r}", status=403)


NOBODY = Caller(None, None)


@runtime_checkable
class Calls(Protocol):
    """Is told of every call."""

    def entered(self) -> None:
        """One began."""
        ...

    def left(self, status: int) -> None:
        """One was answered."""
        ...


@dataclass
class RequestMiddleware:
    """The middleware.

    Attributes:
      app: what is behind it.
      admission: knows whether the server stops.
      keys: none let everybody in.
      config: limits and time-outs.
      calls: told of every call.
      local_only: the server is on a loopback address.
      tracing: where spans go, if calls are traced.
    """

    app: ASGIApp
    admission: Admission
    keys: Keys
    config: ServerConfig
    calls: Calls
    local_only: bool
    tracing: Tracing | None = None

    def __post_init__(self) -> None:
        self._limits = {key.name: KeyLimits(key) for key in self.keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        call = _Call(_id_of(headers), send)
        token = logs.request_id.set(call.request_id)
        self.calls.entered()
        try:
            with call.span(self.tracing, scope, headers):
                await self._serve(scope, headers, receive, call)
        finally:
            self.calls.left(call.status)
            call.log(scope)
            logs.request_id.reset(token)

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, call: _Call) -> None:
        path = scope["path"]
        entered: KeyLimits | None = None
        try:
            if path not in _ALWAYS:
                self.admission.check_open()
            self._check_origin(scope, headers)
            if not (path in _OPEN or path.startswith(_OPEN_PREFIXES)):
                call.caller = self._caller(headers)
                right = right_for(scope["method"], path)
                if right is not None:
                    call.caller.require(right)
                if right == "generate" and call.caller.limits is not None:
                    call.caller.limits.enter()
                    entered = call.caller.limits
        except ApiError as error:
            await error_response(error)(scope, receive, call.send)
            return
        limits = call.caller.limits
        call.view = self.admission.view(call.caller.key, limits)
        scope.setdefault("state", {}).update(caller=call.caller, view=call.view)
        try:
            await self.app(scope, _in_time(receive, self.config.body_timeout), call.send)
        finally:
            if entered is not None:
                entered.leave()

    def _caller(self, headers: Headers) -> Caller:
        if not len(self.keys):
            return NOBODY
        kind, _, secret = headers.get("authorization", "").partition(" ")
        # Looked up even if there is none, so that all refusals take the same way.
        key = self.keys.find(secret.strip())
        if kind.lower() != "bearer" or key is None:
            raise ApiError(
                "this server needs an API key: send it as `Authorization: Bearer KEY`"
                if not secret
                else "this API key is not known here",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return Caller(key, self._limits[key.name])

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.local_only and not len(self.keys):
            name = _parts(f"//{host}")[0]
            if not (_is_local_name(name) or name in self.config.allowed_hosts):
                raise ApiError(
                    f"this server answers to localhost only, not to {name!r}; add the name to "
                    "`server.allowed_hosts` of the fleet file, or use API keys",
                    status=403,
                    code="host_not_allowed",
                )
        origin = headers.get("origin")
        if origin is None or origin in self.config.cors_origins or "*" in self.config.cors_origins:
            return
        if _parts(origin)[1] != host:
            raise ApiError(
                f"pages of {origin!r} may not call this server; `server.cors_origins` of the fleet "
                "file says which may",
                status=403,
                code="origin_not_allowed",
            )


class _Call:
    """One call: its answer on its way out gets the id, and what is known of it is logged."""

    def __init__(self, request_id: str, send: Send) -> None:
        self.request_id = request_id
        self.caller = NOBODY
        self.view: View | None = None
        self.status = 499  # nobody was there to be answered
        self._send = send
        self._started = time.monotonic()

    async def send(self, message: Message) -> None:
        """ASGI's `send`."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    def log(self, scope: Scope) -> None:
        """A line about the call, without what was asked or answered."""
        quiet = self.status < 400 and (scope["path"] in _OPEN or scope["method"] == "GET")
        logs.event(
            "request",
            logging.DEBUG if quiet else logging.INFO,
            method=scope["method"],
            path=scope["path"],
            status=self.status,
            seconds=round(time.monotonic() - self._started, 4),
            key=self.caller.key.name if self.caller.key else None,
            **self._measures(),
        )

    @contextlib.contextmanager
    def span(self, tracing: Tracing | None, scope: Scope, headers: Headers) -> Iterator[None]:
        """The call as a span of its caller's trace, if calls are traced."""
        if tracing is None:
            yield
            return
        with tracing.span(f"{scope['method']} {scope['path']}", dict(headers)) as attributes:
            try:
                yield
            finally:
                attributes["gen_ai.request.id"] = self.request_id
                attributes["http.response.status_code"] = self.status
                for name, value in self._measures().items():
                    attributes[_TRACED[name]] = value

    def _measures(self) -> dict[str, str | int | float]:
        return {} if self.view is None else self.view.measures()


_TRACED = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.prompt_tokens",
    "cached_tokens": "gen_ai.usage.cached_tokens",
    "output_tokens": "gen_ai.usage.completion_tokens",
    "ttft": "gen_ai.latency.time_to_first_token",
}
"""Names of what is measured, as vLLM's traces have them."""


def right_for(method: str, path: str) -> Right | None:
    """The right that a call needs besides a key, if any."""
    if path.startswith(_ADMIN_PREFIXES):
        return "admin"
    if path == "/metrics":
        return "metrics"
    return "generate" if method == "POST" else None


def _id_of(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    usable = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
    return given if usable else f"req-{uuid.uuid4().hex}"


def _in_time(receive: Receive, seconds: float) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
    """`receive`, which raises 408 when the body has not arrived in so many seconds."""
    ends = time.monotonic() + seconds
    complete = False

    async def bounded() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout(max(0.0, ends - time.monotonic())):
                message = await receive()
        except TimeoutError:
            raise ApiError(
                f"the body did not arrive within {seconds:g} s", status=408, code="body_timeout"
            ) from None
        complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return bounded


def _parts(address: str) -> tuple[str, str]:
    """The host name and the place (name and port) of an address; '?' for one that has none."""
    try:
        found = urlsplit(address)
        return (found.hostname or "").lower(), found.netloc
    except ValueError:  # brackets that do not match
        return "?", "?"


def _is_local_name(name: str) -> bool:
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
