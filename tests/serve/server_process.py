"""Servers as processes, for tests with signals: with a fake fleet, and `muxjax serve`."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def serving(
    delay: float,
    drain_timeout: float = 10.0,
    tls: tuple[Path, Path] | None = None,
    stderr: int | None = None,
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs the server and yields the process and its URL when it is ready."""
    command = [sys.executable, "-m", "tests.serve.serve_fake", str(delay), str(drain_timeout)]
    command += [str(path) for path in tls or ()]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith("serving chat, plain/base, ids on http")
            yield process, line.split()[-1]
        finally:
            process.kill()


def start_muxjax(fleet_file: Path, port: int = 0) -> subprocess.Popen[str]:
    """Starts `muxjax serve` on a port; by default on a free one."""
    return subprocess.Popen(
        [sys.executable, "-m", "muxjax", "serve", str(fleet_file), "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    """Returns a port that nothing listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
