"""The TPU kernels, in addition to the shared suite: waits, block sizes, compilation."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.api import choose_implementation
from muxjax.pallas_kernels.metadata import AttentionRequest
from muxjax.pallas_kernels.target import KernelTarget
from muxjax.pallas_kernels.tpu.blocks import decode_sizes, prefill_sizes
from muxjax.pallas_kernels.tpu.pages import PageBlock, PageCopies
from tests.pallas_kernels import interpreting
from tests.pallas_kernels.cases import GEOMETRIES, build_case
from tests.pallas_kernels.harness import run


@pytest.mark.parametrize("decode", [True, False])
def test_missing_wait_is_detected(monkeypatch, decode):
    case = build_case((9, 3, 64), [50, 30], [1, 1] if decode else [20, 30])
    assert np.isfinite(run(case, "mosaic_tpu", decode=decode)).all()
    monkeypatch.setattr(PageCopies, "wait", lambda *args: None)
    # The suite's interpreter copies as late as possible: when a copy is waited for.
    assert np.isnan(run(case, "mosaic_tpu", decode=decode)).any()
    # If it copies early instead, it reports the race.
    eager = replace(interpreting.TPU, dma_execution_mode="eager")
    monkeypatch.setattr(interpreting, "TPU", eager)
    with pytest.raises(interpreting.RaceDetected):
        run(case, "mosaic_tpu", decode=decode)


def test_buffers_alternate_over_many_blocks(monkeypatch):
    # Blocks of one page: 19 in the longest context; buffers also alternate between sequences.
    monkeypatch.setattr(
        "muxjax.pallas_kernels.tpu.paged_attention.decode_sizes",
        lambda *args: decode_sizes(*args)._replace(pages=1),
    )
    case = build_case((9, 3, 64), [400, 1, 0, 65, 21, 22], [1] * 6)
    out = run(case, "mosaic_tpu", decode=True)
    assert np.isfinite(out).all()


def test_block_of_pages_has_whole_tiles():
    block = PageBlock(KVLayout(64, 3, 64), 3)  # 21 tokens of 3 rows, one unused row
    assert (block.used_rows, block.page_rows, block.tokens) == (63, 64, 63)
    assert block.rows == 256  # whole vectors of 128 lanes


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_block_sizes_of_every_geometry(geometry):
    num_heads, num_kv, head_dim = geometry
    for rows in (1024, 2048):
        layout = KVLayout(rows, num_kv, head_dim)
        for kind in ("TPU v5 lite", "TPU7x", "cpu"):
            bfloat16 = jnp.dtype("bfloat16")
            assert decode_sizes(kind, layout, num_heads, bfloat16).pages >= 1
            sizes = prefill_sizes(kind, layout, num_heads, 1024, 8, bfloat16)
            assert sizes.pages >= 1
            assert sizes.queries % 16 == 0
            assert sizes.queries * num_heads <= 4096


def test_unsupported_requests_are_rejected():
    def request(rows: int, dtype: str) -> AttentionRequest:
        float32 = jnp.dtype("float32")
        layout = KVLayout(rows, 3, 64)
        return AttentionRequest(
            KernelTarget("tpu", "TPU v5e"), layout, 9, float32, jnp.dtype(dtype), True
        )

    assert choose_implementation(None, request(48, "bfloat16")).name == "mosaic_tpu"
    with pytest.raises(ValueError, match="multiple of 16 rows, not 50"):
        choose_implementation("mosaic_tpu", request(50, "bfloat16"))
    with pytest.raises(ValueError, match="bfloat16 or float32, not float16"):
        choose_implementation("mosaic_tpu", request(48, "float16"))


@pytest.mark.aot_tpu
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs muxjax[tpu]")
@pytest.mark.parametrize("target", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_geometry_compiles(target):
    command = [sys.executable, "-m", "tests.pallas_kernels.compile_mosaic_tpu", target]
    run_result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert run_result.returncode == 0, run_result.stderr[-4000:]
    records = [json.loads(line) for line in run_result.stdout.splitlines()]
    assert len(records) == 4 * len(GEOMETRIES)
    for record in records:
        (vmem,) = record["kernels"].values()
        print(target, record["case"], f"VMEM {vmem / 1e6:.1f} MB in {record['seconds']:.1f} s")
        assert record["pool_copies"] == 0, record
        assert record["temp_bytes"] < 0.02 * record["pool_bytes"], record
        assert 0 < vmem < 48e6, record
