"""Compiles the Hopper kernels with the real compiler, for a described GPU.

`test_mosaic_gpu_aot` runs it in a separate process, since JAX looks for its plugins only once.
Prints one JSON object per line: a kernel and its memory. ptxas prints the kernel's statistics
before it.
"""

import json
import os
import sys
from typing import Any

from muxjax.compile_check.targets import set_environment

CASES = [
    # N, K, H, tokens of a page, unused rows, dtype, window, softcap
    (32, 8, 128, 16, 0, "bfloat16", None, None),  # Llama 3 8B
    (32, 32, 128, 16, 0, "bfloat16", None, None),
    (64, 8, 128, 16, 0, "bfloat16", None, None),
    (9, 3, 64, 32, 0, "bfloat16", None, None),  # SmolLM2
    (14, 2, 64, 16, 0, "bfloat16", 512, 30.0),
    (4, 1, 256, 24, 0, "bfloat16", 512, None),  # Gemma 3
    (6, 6, 48, 16, 0, "float16", None, None),
    (8, 4, 80, 16, 0, "bfloat16", None, None),
    (9, 3, 64, 21, 1, "bfloat16", None, None),  # a page is not a multiple of tokens
    (4, 1, 256, 5, 0, "bfloat16", None, None),
    (32, 8, 128, 16, 0, "float32", None, None),
    (9, 3, 64, 16, 0, "float32", None, None),
    (4, 1, 256, 24, 0, "float32", 512, 30.0),
]
SEQUENCES, CONTEXT, PREFILL_TOKENS, PAGES = 32, 2048, 512, 4096


def compile_case(described: Any, case: tuple[Any, ...], decode: bool) -> dict[str, Any]:
    """Compiles one kernel and returns its record."""
    import jax
    import jax.numpy as jnp

    from muxjax.pallas_kernels import (
        LANES,
        AttentionMetadata,
        AttentionOptions,
        KVLayout,
        paged_attention,
    )
    from muxjax.pallas_kernels.gpu.tiles import choose_tiles

    num_heads, num_kv, head_dim, tokens, unused_rows, name, window, softcap = case
    rows = KVLayout(10**6, num_kv, head_dim).rows_per_token * tokens + unused_rows
    layout, dtype = KVLayout(rows, num_kv, head_dim), jnp.dtype(name)
    count = SEQUENCES if decode else PREFILL_TOKENS
    shapes = [
        ((count, num_heads, head_dim), dtype),
        ((PAGES, rows, LANES), dtype),
        ((SEQUENCES, -(-CONTEXT // layout.tokens_per_page)), jnp.int32),
        ((SEQUENCES,), jnp.int32),
        ((SEQUENCES + 1,), jnp.int32),
        ((), jnp.int32),
    ]

    options = AttentionOptions(head_dim**-0.5, window, softcap)

    def attend(q: Any, kv: Any, tables: Any, lens: Any, starts: Any, layer: Any) -> jax.Array:
        metadata = AttentionMetadata(tables, lens, starts, layout, decode)
        return paged_attention(q, kv, metadata, options, layer)

    args = [jax.ShapeDtypeStruct(*s, sharding=described.sharding) for s in shapes]
    with described.tracing():
        compiled = jax.jit(attend).trace(*args).lower(lowering_platforms=("cuda",)).compile()
    kind = described.devices[0].device_kind
    tiles = choose_tiles(layout, dtype, decode=decode, device_kind=kind)
    return {
        "case": list(case),
        "decode": decode,
        "kernel": "muxjax_decode" if decode else "muxjax_prefill",
        "hlo_has_kernel": "mosaic_gpu" in compiled.as_text(),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "pool_bytes": PAGES * rows * LANES * dtype.itemsize,
        "shared_memory": tiles.shared_memory,
        "direct": tiles.direct,
    }


def main() -> None:
    target = sys.argv[1]
    set_environment(target)  # before JAX is imported
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    from muxjax.compile_check.devices import describe_devices

    described = describe_devices(target)
    for case in CASES:
        for decode in (True, False):
            # ptxas writes directly to the process's standard output; flushing keeps the order.
            print(json.dumps(compile_case(described, case, decode)), flush=True)


if __name__ == "__main__":
    main()
