"""Runs the application with uvicorn on a socket that was bound before the models were loaded."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from muxjax.errors import MuxError
from muxjax.serve.app import create_app
from muxjax.serve.fleet_protocol import FleetLike

_GRACE = 10
"""Seconds that running answers have to end after the first signal."""


class AddressInUse(MuxError):
    """The server's address cannot be had."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a taken port is known before a minute of loading.

    Args:
      host: an address or name; the caller decides whether others than this machine may connect.
      port: 0 for any free one.

    Raises:
      AddressInUse: the address is taken or not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise AddressInUse(f"cannot serve on {host}:{port}: {error.strerror}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise AddressInUse(f"cannot serve on {host}:{port}: {error.strerror}") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """The address to give to clients."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(fleet: FleetLike, bound: socket.socket, *, say: Callable[[str], None]) -> None:
    """Answers requests until SIGINT or SIGTERM; running answers then have some seconds to end.

    Args:
      fleet: the models; stays the caller's to close.
      bound: from `bind`; closed at the end.
      say: told the address and `curl` lines when the first request may come.
    """
    config = uvicorn.Config(
        create_app(fleet),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE,
        server_header=False,
    )
    server = _Server(config, lambda: say(welcome(fleet, url_of(bound))))
    try:
        server.run(sockets=[bound])
    except KeyboardInterrupt:
        # uvicorn raises the signal that ended it once more, for its caller.
        if not server.started:
            raise


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Makes SIGTERM end the program as Ctrl-C does, so that what is open is closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def welcome(fleet: FleetLike, url: str) -> str:
    """What is served, where, and a line to try it with each model."""
    lines = [f"serving {', '.join(fleet.models)} on {url}"]
    for model in fleet.models.values():
        chats = getattr(model.tokenizer, "chat_template", None) is not None
        body: dict[str, object] = {"model": model.name}
        if chats:
            body["messages"] = [{"role": "user", "content": "Why is the sky blue?"}]
        else:
            body["prompt"] = [1, 2, 3] if model.tokenizer is None else "Once upon a time"
        body["max_tokens"] = 64
        path = "/v1/chat/completions" if chats else "/v1/completions"
        data = shlex.quote(json.dumps(body))
        lines.append(f"curl {url}{path} -H 'Content-Type: application/json' -d {data}")
    return "\n".join(lines)


class _Server(uvicorn.Server):
    """uvicorn, which says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()
