"""Every shape of the Hopper kernels compiles for sm_90a with the real compiler, including ptxas."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from muxjax.pallas_kernels.gpu.tiles import SHARED_MEMORY
from tests.pallas_kernels.compile_mosaic_gpu import CASES

pytestmark = [
    pytest.mark.aot_cuda,
    pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="needs muxjax[aot-cuda]"),
]


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """One record per kernel, with the registers and spilled bytes that ptxas printed."""
    command = [sys.executable, "-m", "tests.pallas_kernels.compile_mosaic_gpu", "h100"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return list(_records(run.stdout))


def _records(output: str) -> Iterator[dict[str, Any]]:
    statistics = {}
    for line in output.splitlines():
        if match := re.search(r"Used (\d+) registers", line):
            statistics["registers"] = int(match[1])
        elif match := re.search(r"(\d+) bytes spill stores", line):
            statistics["spilled"] = int(match[1])
        elif line.startswith("{"):
            yield json.loads(line) | statistics
            statistics = {}


def test_all_kernels_compile(compiled):
    assert len(compiled) == 2 * len(CASES)
    for record in compiled:
        assert record["hlo_has_kernel"], record
        assert record["registers"] <= 255, record
        print(
            record["kernel"],
            *record["case"],
            f"shared memory {record['shared_memory']}, registers {record['registers']}, "
            f"spilled {record['spilled']}, temp {record['temp_bytes']} bytes",
        )


def test_pool_is_not_copied(compiled):
    for record in compiled:
        assert record["temp_bytes"] < 0.1 * record["pool_bytes"], record


def test_shared_memory_fits(compiled):
    assert all(record["shared_memory"] <= SHARED_MEMORY for record in compiled)


def test_16_bit_kernels_spill_at_most_256_bytes(compiled):
    for record in compiled:
        if record["case"][5] != "float32":
            assert record["spilled"] <= 256, record
