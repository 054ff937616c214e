import jax.numpy as jnp

from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.tpu import blocks
from muxjax.pallas_kernels.tpu.blocks import BlockGeometry, BlockSizes, decode_sizes, prefill_sizes

LAYOUT = KVLayout(1024, 8, 128)
BFLOAT16 = jnp.dtype("bfloat16")


def test_decode_pages_hide_the_memory_latency():
    # A page has 256 KiB; a v5e's block has 512 KiB, a TPU7x's 2 MiB.
    assert decode_sizes("TPU v5 lite", LAYOUT, 32, BFLOAT16) == BlockSizes(2, 1, 64 << 20)
    assert decode_sizes("TPU7x", LAYOUT, 32, BFLOAT16) == BlockSizes(8, 1, 48 << 20)
    # Scores of 64 heads and 4096 rows need 1 MiB; 4 MiB is the maximum.
    assert decode_sizes("TPU7x", LAYOUT, 512, BFLOAT16).pages == 2


def test_prefill_queries_depend_on_queries_per_sequence():
    assert prefill_sizes("TPU v5 lite", LAYOUT, 32, 1024, 1, BFLOAT16).queries == 128
    assert prefill_sizes("TPU v5 lite", LAYOUT, 16, 1024, 32, BFLOAT16).queries == 64
    assert prefill_sizes("TPU v5 lite", LAYOUT, 16, 16, 1, BFLOAT16).queries == 16


def test_tuned_size_has_precedence(monkeypatch):
    key = BlockGeometry("TPU7x", "prefill", 32, 8, 128, 1024, "bfloat16")
    monkeypatch.setitem(blocks.TUNED, key, (3, 32))
    assert prefill_sizes("TPU7x", LAYOUT, 32, 1024, 8, BFLOAT16) == BlockSizes(3, 32, 48 << 20)
    assert prefill_sizes("TPU7x", LAYOUT, 16, 1024, 8, BFLOAT16).pages != 3
