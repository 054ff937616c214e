"""The Mosaic GPU kernels, interpreted, in addition to the shared suite in `test_attention`."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.gpu import core
from muxjax.pallas_kernels.gpu import paged_attention as mosaic_gpu
from muxjax.pallas_kernels.gpu.prefill import split_queries
from muxjax.pallas_kernels.gpu.tiles import SHARED_MEMORY, choose_splits, choose_tiles
from muxjax.pallas_kernels.metadata import AttentionRequest
from muxjax.pallas_kernels.target import KernelTarget
from tests.pallas_kernels.cases import GEOMETRIES, AttentionCase, build_case, compute_dense
from tests.pallas_kernels.harness import run as run_implementation
from tests.pallas_kernels.interpreting import GPU_INTERPRETER

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
runs_kernels = pytest.mark.skipif(not GPU_INTERPRETER, reason="needs JAX 0.12 or a GPU")


def run(case: AttentionCase, *, dtype=jnp.float32, decode=False, window=None) -> np.ndarray:
    return run_implementation(case, "mosaic_gpu", dtype=dtype, decode=decode, window=window)


def error(case: AttentionCase, out: np.ndarray, window=None) -> float:
    """Largest error, relative to the largest output."""
    expected = compute_dense(case, case.layout.head_dim**-0.5, window, None)
    queries = case.query_starts[-1]
    assert np.isfinite(out[:queries]).all(), "a row that must not be read was read"
    return np.abs(out[:queries] - expected[:queries]).max() / np.abs(expected[:queries]).max()


def layout(num_kv: int, head_dim: int, tokens: int, unused_rows: int = 0) -> KVLayout:
    """Pages of `tokens` tokens and `unused_rows` unused rows."""
    rows = KVLayout(10**6, num_kv, head_dim).rows_per_token * tokens + unused_rows
    return KVLayout(rows, num_kv, head_dim)


# Pages of 8 and 24 tokens are fetched directly; pages of 5 are staged.
@runs_kernels
@pytest.mark.parametrize("tokens", [8, 24, 5])
@pytest.mark.parametrize("decode", [True, False])
def test_pages_of_any_number_of_tokens(tokens, decode):
    lens, queries = ([70, 1], [1, 1]) if decode else ([70], [33])
    case = build_case((2, 1, 128), lens, queries, layout=layout(1, 128, tokens)).rounded()
    tiles = choose_tiles(case.layout, jnp.dtype("bfloat16"), decode=decode, device_kind="cpu")
    assert tiles.direct == (tokens % 8 == 0)
    out = run(case, dtype=jnp.bfloat16, decode=decode, window=50)
    assert error(case, out, window=50) < 2e-2


@runs_kernels
def test_pages_that_are_not_a_multiple_of_tokens():
    case = build_case((3, 1, 64), [70], [1], layout=layout(1, 64, 16))
    odd = build_case((2, 2, 64), [20], [1], layout=layout(2, 64, 16, unused_rows=1))
    assert not choose_tiles(odd.layout, odd.kv.dtype, decode=True, device_kind="cpu").whole_tokens
    for pages in (case, odd):
        assert error(pages, run(pages, decode=True)) < 2e-5


@runs_kernels
def test_float16():
    case = build_case((4, 2, 64), [70], [1], layout=layout(2, 64, 16))
    assert error(case, run(case, dtype=jnp.float16, decode=True)) < 1e-2


@runs_kernels
def test_block_of_queries_writes_only_its_rows():
    # Blocks of queries end in the middle of a tile.
    case = build_case((1, 1, 64), [130, 1, 7], [130, 1, 7], padding=3, layout=layout(1, 64, 16))
    out = run(case)
    assert error(case, out) < 2e-5
    assert (out[-3:] == 0).all()


def test_query_blocks():
    lens, starts = jnp.array([300, 0, 40]), jnp.array([0, 130, 130, 135])
    blocks = np.asarray(split_queries(lens, starts, 140, 128)).T
    used = blocks[blocks[:, 2] > 0]
    # (sequence, first query, queries, first position, tokens); the last block is padding.
    assert used.tolist() == [
        [0, 0, 128, 170, 300],
        [0, 128, 2, 298, 300],
        [2, 130, 5, 35, 40],
        [2, 135, 5, -5, 0],
    ]


@runs_kernels
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU would hang")
@pytest.mark.parametrize("barrier", ["ready", "staged"])
def test_missing_wait_is_detected(barrier, monkeypatch):
    """The other tests rely on this error of the interpreter."""
    wait = plgpu.barrier_wait
    case = build_case((1, 1, 64), [70], [1], layout=layout(1, 64, 16))

    @contextmanager
    def skip_waits_for(name):
        arrays = {}
        scratch = core.Buffers

        def remember(*refs):
            buffers = scratch(*refs)
            arrays["ref"] = getattr(buffers, name)
            return buffers

        def maybe_wait(ref):
            if getattr(ref, "ref", ref) is not arrays["ref"]:
                wait(ref)

        monkeypatch.setattr(core, "Buffers", remember)
        monkeypatch.setattr(plgpu, "barrier_wait", maybe_wait)
        yield

    detected = pytest.raises(Exception, match=r"RACE DETECTED|no threads observed")
    with skip_waits_for(barrier), detected:
        run(case, decode=True)


@pytest.mark.parametrize("geometry", [*GEOMETRIES, (32, 4, 112), (64, 1, 128), (1, 1, 16)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("decode", [True, False])
def test_tiles_fit_shared_memory(geometry, dtype, decode):
    _, num_kv, head_dim = geometry
    for tokens in (5, 16, 24):
        pages = layout(num_kv, head_dim, tokens)
        tiles = choose_tiles(pages, jnp.dtype(dtype), decode=decode, device_kind="NVIDIA H200")
        assert tiles.shared_memory <= SHARED_MEMORY
        assert tiles.tokens % tiles.chunk == 0
        assert pages.tokens_per_page % tiles.chunk == 0
        assert tiles.width >= head_dim


def test_products_of_parts():
    tiles = choose_tiles(layout(1, 64, 16), jnp.dtype("float32"), decode=True, device_kind="")
    assert sorted(tiles.products) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    tiles = choose_tiles(layout(1, 64, 16), jnp.dtype("bfloat16"), decode=True, device_kind="")
    assert tiles.products == ((0, 0),)


def test_splits():
    tiles = choose_tiles(layout(8, 128, 16), jnp.dtype("bfloat16"), decode=True, device_kind="")
    assert choose_splits(tiles, 1, 8192) == 50  # three waves of blocks on 132 multiprocessors
    assert choose_splits(tiles, 1, 640) == 10  # the most splits with at least two tiles each
    assert choose_splits(tiles, 32, 2048) == 2
    assert choose_splits(tiles, 256, 2048) == 1
    assert choose_splits(tiles, 1, 16) == 1


def request(**changes) -> AttentionRequest:
    bfloat16 = jnp.dtype("bfloat16")
    fields = {
        "target": KernelTarget("gpu", "NVIDIA H200"),
        "layout": layout(8, 128, 16),
        "num_heads": 32,
        "q_dtype": bfloat16,
        "kv_dtype": bfloat16,
        "decode": True,
    }
    return AttentionRequest(**fields | changes)


def test_unsupported_requests():
    assert mosaic_gpu.unsupported_reason(request()) is None
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H20"):
        assert mosaic_gpu.unsupported_reason(request(target=KernelTarget("gpu", kind))) is None
    for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200", "AMD Instinct MI300X"):
        assert f"not {kind}" in mosaic_gpu.unsupported_reason(
            request(target=KernelTarget("gpu", kind))
        )
    assert "not int8" in mosaic_gpu.unsupported_reason(request(kv_dtype=jnp.dtype("int8")))
    assert "not 512" in mosaic_gpu.unsupported_reason(request(layout=layout(1, 512, 16)))
    assert "not 71" in mosaic_gpu.unsupported_reason(
        request(layout=layout(1, 64, 16), num_heads=71)
    )
    assert (
        mosaic_gpu.unsupported_reason(request(layout=layout(1, 64, 16), num_heads=71, decode=False))
        is None
    )
