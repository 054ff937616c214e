"""A second SIGINT or SIGTERM ends the process at once, without output, while it drains or loads."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import yaml

from tests.muxjax.tiny_fleets import fleet
from tests.serve.conftest import wait_until
from tests.serve.server_process import ROOT, free_port, serving, start_muxjax

pytestmark = pytest.mark.faults
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_while_the_server_drains(first: signal.Signals, second: signal.Signals) -> None:
    body = {"model": "chat", "prompt": "ab", "max_tokens": 2000, "stream": True}
    with (
        serving(0.05, drain_timeout=60.0, stderr=subprocess.PIPE) as (process, url),
        httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(first)
        wait_until(lambda: httpx2.get(f"{url}/health/ready").status_code == 503)
        process.send_signal(second)
        with contextlib.suppress(httpx2.HTTPError):
            list(lines)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == -second  # 130 or 143 in a shell
        assert errors == ""


def start_program(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a Python program that is given as text."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SLOW_LOAD = """
import sys, threading, time
from muxjax.stop_signals import interrupted_by_stop_signals
with interrupted_by_stop_signals():
    worker = threading.Thread(target=time.sleep, args=(float(sys.argv[1]),))
    worker.start()
    try:
        print("loading", flush=True)
        worker.join()
    finally:  # as an executor of threads does
        print("closing", flush=True)
        worker.join()
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("signals", [1, 2])
def test_while_a_thread_loads(number: signal.Signals, signals: int) -> None:
    seconds = "600" if signals == 2 else "2"
    with start_program(SLOW_LOAD, seconds) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "loading\n"
            process.send_signal(number)
            assert process.stdout.readline() == "closing\n"
            if signals == 2:
                process.send_signal(number)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == -number
        assert (output, errors) == ("", "")


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet("llama", max_seqs=2, prefill_tokens=16)))
    return path


def is_bound(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


@pytest.mark.parametrize("number", SIGNALS)
def test_one_signal_ends_a_server_that_loads(fleet_file: Path, number: signal.Signals) -> None:
    port = free_port()
    with start_muxjax(fleet_file, port) as process:
        try:
            wait_until(lambda: is_bound(port), 60)
            process.send_signal(number)
            output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == -number
        assert (output, errors) == ("", "")


def test_a_second_server_on_the_port_of_one_that_loads_fails_at_once(fleet_file: Path) -> None:
    port = free_port()
    with start_muxjax(fleet_file, port) as first:
        try:
            wait_until(lambda: is_bound(port), 60)
            with start_muxjax(fleet_file, port) as second:
                output, errors = second.communicate(timeout=60)
            assert first.poll() is None
            assert second.returncode == 2
            assert output == ""
            assert errors == f"muxjax: cannot serve on 127.0.0.1:{port}: Address already in use\n"
            assert first.stdout
            assert first.stdout.readline().endswith(f"http://127.0.0.1:{port}\n")
            first.send_signal(signal.SIGTERM)
            first.communicate(timeout=60)
            assert first.returncode == 0
        finally:
            first.kill()


def test_sigint_ends_a_command_without_a_traceback() -> None:
    program = (
        "import threading, time\n"
        "from muxjax.cli import main\n"
        "def app():\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "    print('runs', flush=True)\n"
        "    time.sleep(600)\n"
        "main.app = app\n"
        "main.main()\n"
    )
    with start_program(program) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "runs\n"
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == -signal.SIGINT
        assert (output, errors) == ("", "")
