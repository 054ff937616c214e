"""A server for the blocks that talk to one."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.docs.workspace import Workspace, kill_group

START_SECONDS, STOP_SECONDS = 400.0, 60.0


class ServerFailed(Exception):
    """A server did not start or did not stop; the message has its output."""


class Server:
    """The server of a workspace: at most one at a time, on the workspace's port."""

    def __init__(self, workspace: Workspace, logs: Path) -> None:
        self._workspace = workspace
        self._log = logs / "server.log"
        self._process: subprocess.Popen[str] | None = None
        self._fleet: str | None = None

    def serve_fleet(self, fleet: str) -> None:
        """Serves a fleet file, unless it is already served."""
        if self._process is not None and self._fleet == fleet and self._process.poll() is None:
            return
        self.start(f"exec muxjax serve {fleet} --port {self._workspace.port}")
        self._fleet = fleet

    def start(self, script: str) -> None:
        """Runs a script whose last command is a server, until that is ready.

        Raises:
          ServerFailed: the script ended, or the server was not ready in time.
        """
        self.stop()
        self._process = self._workspace.start(script, self._log)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                kill_group(self._process)
                self._process = None
                raise ServerFailed(f"the server did not start:\n{self._output()}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Stops the server as an operator does.

        Raises:
          ServerFailed: it does not end, or not with status 0.
        """
        process, self._process, self._fleet = self._process, None, None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGTERM)
            status = process.wait(STOP_SECONDS)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            status = process.poll()
        finally:
            kill_group(process)
        if status != 0:
            raise ServerFailed(f"the server ended with status {status}:\n{self._output()}")

    def _is_ready(self) -> bool:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        for scheme in ("http", "https"):
            url = f"{scheme}://127.0.0.1:{self._workspace.port}/health/ready"
            try:
                with urllib.request.urlopen(url, timeout=5, context=context) as response:
                    return response.status == 200
            except (urllib.error.URLError, OSError, ValueError):
                continue
        return False

    def _output(self) -> str:
        return "\n".join(self._log.read_text().splitlines()[-30:])
