"""Processes that serve one model together, each with two of its four devices."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.eight_devices import ROOT
from tests.muxjax.on_eight_devices import fleet

DEVICES = 2
START_SECONDS = 150


def fleet_file(folder: Path) -> Path:
    """A model cut for the devices of both processes; its tokens follow from its configuration."""
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet(2 * DEVICES, {"llama3": 2 * DEVICES})))
    return path


@contextlib.contextmanager
def serving(
    file: Path, logs: Path, cache: Path
) -> Iterator[tuple[list[subprocess.Popen[str]], str]]:
    """The two processes, and the leader's address once it serves.

    Args:
      file: the fleet.
      logs: a folder for what they write to standard error.
      cache: a folder for what is compiled: the second start is quicker.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    files = contextlib.ExitStack()
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "muxjax", "serve", str(file), "--port", "0"),
                *("--coordinator", f"127.0.0.1:{port}", "--process", str(index)),
                *("--processes", "2"),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES} "
                "--xla_backend_optimization_level=0",
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdout=subprocess.PIPE,
            stderr=files.enter_context((logs / f"stderr-{index}").open("w")),
            text=True,
        )
        for index in range(2)
    ]

    def kill() -> None:
        for process in started:
            process.kill()  # JAX may trap SIGTERM

    slow = threading.Timer(START_SECONDS, kill)
    slow.start()
    try:
        address = _address(started[0], logs)
        slow.cancel()
        yield started, address
    finally:
        slow.cancel()
        kill()
        for process in started:
            process.communicate(timeout=30)
        files.close()


def _address(leader: subprocess.Popen[str], logs: Path) -> str:
    assert leader.stdout is not None
    for line in leader.stdout:
        if " on http" in line:
            return line.rpartition(" on ")[2].strip()
    raise AssertionError((logs / "stderr-0").read_text() + (logs / "stderr-1").read_text())
