"""Runs the application with uvicorn: reloads on SIGHUP, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
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
from muxjax.serve.address import is_local, listen, url_of
from muxjax.serve.app import create_app
from muxjax.serve.fleet_protocol import FleetLike, ManagedFleet
from muxjax.serve.ops.model_control import ModelControl
from muxjax.serve.settings import ServerSettings
from muxjax.stop_signals import STOP_SIGNALS, end_at_next_signal

_POLL_SECONDS = 0.05
"""Interval at which draining checks for running streams."""
_SHUTDOWN_TIMEOUT = 5
"""Seconds for sending the last events of aborted streams."""


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
    after `drain_timeout` are aborted. A second signal ends the process at once.

    Args:
      fleet: the models; the caller closes it.
      bound: from `address.bind`; closed at the end.
      say: receives the URL and example `curl` commands when the server is ready.
      settings: API keys, limits and timeouts.
      tls: certificate and key for HTTPS; None for HTTP.

    Raises:
      AddressInUse: another process listens on the address.
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
    listen(bound)
    try:
        with sighup_reloads(app.state.control):
            server.run(sockets=[bound])
        if not server.started:
            raise KeyboardInterrupt
    finally:
        if settings.tracing is not None:
            settings.tracing.close()


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
        self._stopping = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to accept connections."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM while the server runs.

        After the first signal, the default action stays: it also ends the process while the caller
        closes the fleet.
        """
        previous = {number: signal.signal(number, self.handle_exit) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            if not self._stopping:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts to drain; the next signal ends the process."""
        end_at_next_signal()
        self._stopping = True
        if self._loop is None:
            self.should_exit = True
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
