"""Runs the application with uvicorn: binds the address, reloads on SIGHUP, drains on SIGTERM."""

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
from muxjax.serve import logs
from muxjax.serve.access.admission import Admission
from muxjax.serve.access.keys import ENVIRONMENT
from muxjax.serve.app import create_app
from muxjax.serve.fleet_protocol import FleetLike, ManagedFleet
from muxjax.serve.ops.model_control import ModelControl
from muxjax.serve.settings import ServerSettings

_POLL_SECONDS = 0.05
"""Interval at which draining checks for running streams."""
_SHUTDOWN_TIMEOUT = 5
"""Seconds for sending the last events of aborted streams."""


class AddressInUse(MuxError):
    """The address of the server is in use or not available."""


class InsecureServer(MuxError):
    """The server would be reachable from other machines without requiring API keys."""


class TlsError(MuxError):
    """The TLS certificate or its key cannot be used."""


@dataclass(frozen=True)
class Tls:
    """TLS files in PEM format.

    Attributes:
      certificate: the certificate with its chain.
      key: the private key, without a passphrase.
    """

    certificate: Path
    key: Path

    def check(self) -> None:
        """Loads both files, to report an error before the models are loaded.

        Raises:
          TlsError: a file cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Without a password, OpenSSL would prompt for a passphrase on the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ssl.SSLError) as error:
            raise TlsError(
                f"{self.certificate} and {self.key} cannot be used: {error.strerror or error}"
            ) from error


def bind(host: str, port: int) -> socket.socket:
    """Binds a socket without listening, to report a port in use before the models are loaded.

    Args:
      host: address or host name.
      port: 0 for any free port.

    Raises:
      AddressInUse: the address is in use or does not belong to this machine.
    """
    try:
        candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = candidates[0]
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
    """Returns the URL for clients on this machine."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_exposure(bound: socket.socket, settings: ServerSettings, *, insecure: bool) -> None:
    """Refuses to serve other machines without API keys.

    Args:
      bound: the socket of the server.
      settings: the server's settings.
      insecure: whether the user passed `--insecure`.

    Raises:
      InsecureServer: not a loopback address, no API keys and no `--insecure`.
    """
    if settings.local_only or len(settings.keys) or insecure:
        return
    raise InsecureServer(
        f"{bound.getsockname()[0]} is reachable from other machines, and no API key is set. Set "
        f"{ENVIRONMENT} or --keys FILE (`muxjax key NAME` generates a key), serve on 127.0.0.1, or "
        "pass --insecure"
    )


def is_local(bound: socket.socket) -> bool:
    """Whether the socket is bound to a loopback address."""
    return ipaddress.ip_address(bound.getsockname()[0].split("%")[0]).is_loopback


def serve(
    fleet: ManagedFleet,
    bound: socket.socket,
    *,
    say: Callable[[str], None],
    settings: ServerSettings | None = None,
    tls: Tls | None = None,
) -> None:
    """Serves requests until SIGINT or SIGTERM, then drains and returns.

    While the server drains, running requests continue and new ones get 503. Requests that still run
    after `drain_timeout` are aborted. A second signal ends the server at once.

    Args:
      fleet: the models; the caller closes it.
      bound: from `bind`; closed at the end.
      say: receives the URL and example `curl` commands when the server is ready.
      settings: API keys, limits and timeouts.
      tls: certificate and key for HTTPS; None for HTTP.

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
        timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT,
        server_header=False,
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else tls.key,
    )
    if tls is not None:
        tls.check()
    url = url_of(bound) if tls is None else url_of(bound).replace("http:", "https:", 1)

    def ready() -> None:
        say(welcome_text(fleet, url, with_key=len(settings.keys) > 0))

    server = _Server(config, app.state.admission, settings.server.drain_timeout, ready)
    try:
        with sighup_reloads(app.state.control):
            server.run(sockets=[bound])
    except KeyboardInterrupt:
        # uvicorn raises the signal again after it has shut down.
        if not server.started:
            raise
    finally:
        if settings.tracing is not None:
            settings.tracing.close()


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt, so that open contexts are closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def sighup_reloads(control: ModelControl) -> Iterator[None]:
    """Makes SIGHUP apply the fleet file to the running fleet; the result is logged."""

    def reload() -> None:
        with contextlib.suppress(MuxError):  # logged; nothing has changed
            control.apply_fleet_file()

    def start(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=reload, name="muxjax-reload", daemon=True).start()

    previous = signal.signal(signal.SIGHUP, start)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)


def welcome_text(fleet: FleetLike, url: str, *, with_key: bool = False) -> str:
    """Formats the served models, the URL and an example `curl` command for each model."""
    lines = [f"serving {', '.join(fleet.models)} on {url}"]
    key = ' -H "Authorization: Bearer $KEY"' if with_key else ""
    for model in fleet.models.values():
        has_chat = model.tokenizer is not None and model.tokenizer.chat_template is not None
        body: dict[str, object] = {"model": model.name}
        if has_chat:
            body["messages"] = [{"role": "user", "content": "Why is the sky blue?"}]
        else:
            body["prompt"] = [1, 2, 3] if model.tokenizer is None else "Once upon a time"
        body["max_tokens"] = 64
        path = "/v1/chat/completions" if has_chat else "/v1/completions"
        data = shlex.quote(json.dumps(body))
        lines.append(f"curl {url}{path} -H 'Content-Type: application/json'{key} -d {data}")
    return "\n".join(lines)


class _Server(uvicorn.Server):
    """A uvicorn server that reports when it is ready, and drains before it shuts down."""

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
        """Starts to accept connections."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains at the first signal and exits at the second."""
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
        deadline = time.monotonic() + self._drain_timeout
        while admission.streams and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        if admission.streams:
            logs.event("aborted", logging.WARNING, running=len(admission.streams))
            admission.abort_all()
        self.should_exit = True
