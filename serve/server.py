"""Runs the application with uvicorn on a socket that was bound before the models were loaded."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import shlex
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from muxjax.errors import MuxError
from muxjax.serve.access.admission import Admission
from muxjax.serve.access.keys import ENVIRONMENT
from muxjax.serve.app import create_app
from muxjax.serve.fleet_protocol import FleetLike, ManagedFleet
from muxjax.serve import logs
from muxjax.serve.ops.model_control import ModelControl
from muxjax.serve.settings import ServerSettings

_LOOK = 0.05
"""Seconds between looks at whether all has ended."""
_LAST_SECONDS = 5
"""For the last events of answers that were cut to be sent."""


class AddressInUse(MuxError):
    """The server's address cannot be had."""


class Exposed(MuxError):
    """Other machines could use the server, and nothing keeps them from it."""


class TlsError(MuxError):
    """A certificate or key that cannot be used."""


@dataclass(frozen=True)
class Tls:
    """Files in PEM form.

    Attributes:
      certificate: with the chain that clients need.
      key: its private key, without a passphrase.
    """

    certificate: Path
    key: Path

    def check(self) -> None:
        """Reads both, which a minute of loading should not come before.

        Raises:
          TlsError: they cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Without a password function OpenSSL would ask the terminal for a passphrase.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ssl.SSLError) as error:
            raise TlsError(
                f"{self.certificate} and {self.key} cannot be used: {error.strerror or error}"
            ) from error


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


def check_exposure(bound: socket.socket, settings: ServerSettings, *, insecure: bool) -> None:
    """Refuses to serve to other machines without keys.

    Raises:
      Exposed: the address is not a loopback one, there are no keys, and it is not forced.
    """
    if settings.local_only or len(settings.keys) or insecure:
        return
    raise Exposed(
        f"{bound.getsockname()[0]} can be reached from other machines, and no API key is set: "
        f"anyone there could use the models. Set {ENVIRONMENT} or --keys FILE (`muxjax key NAME` "
        "makes one), serve on 127.0.0.1, or say --insecure"
    )


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine can reach the address."""
    return ipaddress.ip_address(bound.getsockname()[0].split("%")[0]).is_loopback


def serve(
    fleet: ManagedFleet,
    bound: socket.socket,
    *,
    say: Callable[[str], None],
    settings: ServerSettings | None = None,
    tls: Tls | None = None,
) -> None:
    """Answers requests until SIGINT or SIGTERM, and then drains.

    While it drains, running requests go on and new ones get 503. What still runs after
    `drain_timeout` is cut. A second signal ends it at once.

    Args:
      fleet: the models; stays the caller's to close.
      bound: from `bind`; closed at the end.
      say: told the address and `curl` lines when the first request may come.
      settings: keys, limits, time-outs.
      tls: certificate and key, to serve over HTTPS.

    Raises:
      TlsError: the certificate or its key cannot be used.
    """
    settings = settings or ServerSettings(local_only=is_local(bound))
    app = create_app(fleet, settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
        server_header=False,
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else tls.key,
    )
    if tls is not None:
        tls.check()
    url = url_of(bound) if tls is None else url_of(bound).replace("http:", "https:", 1)

    def ready() -> None:
        say(welcome(fleet, url, keyed=len(settings.keys) > 0))

    server = _Server(config, app.state.admission, settings.server.drain_timeout, ready)
    try:
        with sighup_reloads(app.state.control):
            server.run(sockets=[bound])
    except KeyboardInterrupt:
        # uvicorn raises the signal that ended it once more, for its caller.
        if not server.started:
            raise
    finally:
        if settings.tracing is not None:
            settings.tracing.close()


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


@contextlib.contextmanager
def sighup_reloads(control: ModelControl) -> Iterator[None]:
    """Makes SIGHUP apply the fleet file as it is then; what comes of it is logged."""

    def reload() -> None:
        with contextlib.suppress(MuxError):  # it was logged, and nothing has changed
            control.read_again()

    def start(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=reload, name="muxjax-reload", daemon=True).start()

    before = signal.signal(signal.SIGHUP, start)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def welcome(fleet: FleetLike, url: str, *, keyed: bool = False) -> str:
    """What is served, where, and a line to try it with each model."""
    lines = [f"serving {', '.join(fleet.models)} on {url}"]
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
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
        lines.append(f"curl {url}{path} -H 'Content-Type: application/json'{key} -d {data}")
    return "\n".join(lines)


class _Server(uvicorn.Server):
    """uvicorn, which says when it is ready, and drains before it ends."""

    def __init__(
        self,
        config: uvicorn.Config,
        admission: Admission,
        drain_timeout: float,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._admission = admission
        self._drain_timeout = drain_timeout
        self._ready = ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends it at once."""
        if self._loop is None or self._admission.draining:
            super().handle_exit(sig, frame)
            self.force_exit = self._loop is not None
            return
        self._admission.draining = True
        self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        admission = self._admission
        logs.event("draining", running=len(admission.streams), seconds=self._drain_timeout)
        ends = time.monotonic() + self._drain_timeout
        while admission.streams and time.monotonic() < ends:
            await asyncio.sleep(_LOOK)
        if admission.streams:
            logs.event("cut", logging.WARNING, running=len(admission.streams))
            admission.cut()
        self.should_exit = True
