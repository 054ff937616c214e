"""Two processes that serve one model, each with two of its four devices."""

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
    """Writes a fleet file with a model that is sharded over the devices of both processes."""
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet(2 * DEVICES, {"llama3": 2 * DEVICES})))
    return path


@contextlib.contextmanager
def serving(
    file: Path, logs: Path, cache: Path
) -> Iterator[tuple[list[subprocess.Popen[str]], str]]:
    """Starts the two processes; yields them and the leader's address.

    Args:
      file: the fleet file.
      logs: a folder for their standard error.
      cache: a folder for compiled programs, which speeds up the next start.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    files = contextlib.ExitStack()
    processes = [
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
        for process in processes:
            process.kill()  # JAX may trap SIGTERM

    timer = threading.Timer(START_SECONDS, kill)
    timer.start()
    try:
        address = _address(processes[0], logs)
        timer.cancel()
        yield processes, address
    finally:
        timer.cancel()
        kill()
        for process in processes:
            process.communicate(timeout=30)
        files.close()


def _address(leader: subprocess.Popen[str], logs: Path) -> str:
    assert leader.stdout is not None
    for line in leader.stdout:
        if " on http" in line:
            return line.rpartition(" on ")[2].strip()
    raise AssertionError((logs / "stderr-0").read_text() + (logs / "stderr-1").read_text())
