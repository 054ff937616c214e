"""Fleets that do not fit into memory are refused before their weights are loaded."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from muxjax import Fleet
from muxjax.errors import InsufficientMemory, ModelUnavailable
from muxjax.executor.free_memory import FreeMemory
from muxjax.units import build, memory_check
from tests.muxjax.units.harness import EXTRA, FILE

ROOT = Path(__file__).parents[3]
LARGE = """
models:
  - name: expert
    source: config:llama
    config: {hidden_size: 8192, intermediate_size: 28672, num_hidden_layers: 800,
             num_attention_heads: 64, num_key_value_heads: 8}
"""
SMALL = """
models:
  - name: tiny
    source: config:llama
    config: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
             num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 300}
    max_model_len: 64
"""


def serve(path: Path, text: str, *, limit: int | None = None) -> tuple[int, str, float, int]:
    """Runs `muxjax serve`; returns its status, standard error, seconds and peak bytes."""
    path.write_text(text, encoding="utf-8")

    began = time.monotonic()
    command = [sys.executable, "-m", "muxjax", "serve", str(path), "--port", "0"]
    if limit is not None:
        command = ["sh", "-c", f'ulimit -v {limit // 1024}; exec "$@"', "sh", *command]
    log = path.with_suffix(".log")
    peak = 0
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, cwd=ROOT, stderr=stderr) as process,
    ):
        try:
            while process.poll() is None and time.monotonic() < began + 300:
                peak = max(peak, _resident_peak(process.pid))
                time.sleep(0.05)
        finally:
            process.kill()
    return process.returncode, log.read_text(), time.monotonic() - began, peak


def _resident_peak(pid: int) -> int:
    """Peak resident bytes of a process; 0 if it has ended.

    `ru_maxrss` would count the pages of the test process before the new program was started.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(peak[1]) * 1024 if peak else 0


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        (LARGE, None, "times the memory would do"),
        (SMALL + "pool: {memory: 300GB}\n", None, "set `pool.memory` to at most"),
        (SMALL + "pool: {memory: 6GB}\n", 6 * 10**9, "within the limit of `ulimit -v`"),
    ],
)
def test_serve_refuses_in_one_line_and_touches_no_memory(tmp_path, text, limit, expected):
    code, stderr, seconds, peak = serve(tmp_path / "fleet.yaml", text, limit=limit)
    # A processor without the native kernels is logged in a line before.
    errors = [line for line in stderr.splitlines() if "matrix products" not in line]
    assert (code, len(errors)) == (1, 1), stderr
    assert errors[0].startswith("muxjax: the fleet does not fit: it needs ")
    assert expected in errors[0]
    assert seconds < 60
    assert peak < 10**9


def free(monkeypatch, num_bytes: int) -> None:
    memory = FreeMemory(num_bytes, "within the container's memory limit")
    monkeypatch.setattr(memory_check, "host_free_memory", lambda: memory)


def test_a_fleet_that_fits_exactly_is_loaded_and_one_byte_less_is_refused(monkeypatch):
    needs = []

    def record(needed, subject):
        needs.append(memory_check._sum(list(needed.values())))

    with monkeypatch.context() as patch:
        patch.setattr(memory_check, "_check", record)
        Fleet.load(FILE, progress=False).close()
    free(monkeypatch, needs[0].total)
    Fleet.load(FILE, progress=False).close()
    free(monkeypatch, needs[0].total - 1)
    monkeypatch.setattr(build, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(InsufficientMemory, match="the fleet does not fit"):
        Fleet.load(FILE, progress=False)


def test_models_that_are_loaded_later_are_refused(monkeypatch):
    file = {**FILE, "models": [*FILE["models"], {**EXTRA, "name": "later", "sleeping": True}]}
    with Fleet.load(file, progress=False) as fleet:
        free(monkeypatch, 1000)
        with pytest.raises(ModelUnavailable, match=r"extra does not fit: it needs .* of memory"):
            fleet.admin.load(EXTRA)
        with pytest.raises(ModelUnavailable, match=r"later does not fit: it needs .* of memory"):
            fleet.admin.wake("later")
        first = FILE["models"][0]["name"]
        assert len(fleet.generate(first, [[1, 2, 3]])) == 1


def test_a_model_that_was_put_to_sleep_wakes_where_its_weights_are(monkeypatch):
    name = FILE["models"][0]["name"]
    with Fleet.load(FILE, progress=False) as fleet:
        fleet.admin.sleep(name)
        size = fleet.models[name].param_bytes
        need = memory_check._need([fleet.units[0].spec.model_specs[name]], pool=0, weights=False)
        assert need.weights == {name: 0}
        assert size > 0
        free(monkeypatch, need.total)
        fleet.admin.wake(name)
        assert len(fleet.generate(name, [[1, 2, 3]])) == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes")]
)
def test_a_failed_allocation_is_explained(error):
    with (
        pytest.raises(InsufficientMemory, match=r"memory ran out .* lower `pool\.memory`"),
        memory_check.explain_out_of_memory(),
    ):
        raise error


def test_other_errors_are_not_explained_as_memory():
    with pytest.raises(RuntimeError, match="other"), memory_check.explain_out_of_memory():
        raise RuntimeError("other")
