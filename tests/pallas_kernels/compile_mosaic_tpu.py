"""Compiles the TPU kernels with the real compiler, for a described TPU.

`tpu/test_paged_attention.py` runs it in a separate process, since libtpu reads its environment only
once. Prints one JSON object per line.
"""

import json
import sys
import time

from muxjax.compile_check.targets import set_environment
from tests.pallas_kernels.cases import GEOMETRIES, build_layout

SEQUENCES, CHUNKS, BLOCKS, PREFILL_TOKENS, POOL_BYTES = 32, 8, 128, 512, 4 << 30
PREFILL_WINDOW, PREFILL_SOFTCAP = 300, 30.0


def main() -> None:
    target = sys.argv[1]
    set_environment(target)  # before JAX is imported
    import jax
    import jax.numpy as jnp

    from muxjax.compile_check.devices import describe_devices
    from muxjax.compile_check.hlo import find_copies, find_kernels
    from muxjax.pallas_kernels import AttentionMetadata, AttentionOptions, paged_attention

    described = describe_devices(target)

    def shape(dtype: str, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=described.sharding)

    for geometry in GEOMETRIES:
        for dtype in ("bfloat16", "float32"):
            for decode in (True, False):
                num_heads, _, head_dim = geometry
                layout = build_layout(geometry)
                page_bytes = layout.rows * 128 * jnp.dtype(dtype).itemsize
                kv = shape(dtype, POOL_BYTES // page_bytes, layout.rows, 128)
                # Window and soft cap only in prefill, to compile each option once.
                options = AttentionOptions(
                    head_dim**-0.5,
                    None if decode else PREFILL_WINDOW,
                    None if decode else PREFILL_SOFTCAP,
                )

                def attend(
                    q,
                    kv,
                    tables,
                    lens,
                    starts,
                    layer,
                    layout=layout,
                    decode=decode,
                    options=options,
                ):
                    metadata = AttentionMetadata(tables, lens, starts, layout, decode)
                    return paged_attention(q, kv, metadata, options, layer)

                started = time.perf_counter()
                with described.tracing():
                    tokens, seqs = (SEQUENCES,) * 2 if decode else (PREFILL_TOKENS, CHUNKS)
                    lowered = jax.jit(attend).lower(
                        shape("float32", tokens, num_heads, head_dim),
                        kv,
                        shape("int32", seqs, BLOCKS),
                        shape("int32", seqs),
                        shape("int32", seqs + 1),
                        shape("int32"),
                    )
                compiled = lowered.compile()
                hlo = compiled.as_text()
                record = {
                    "case": [*geometry, dtype, "decode" if decode else "prefill"],
                    "seconds": time.perf_counter() - started,
                    "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
                    "pool_bytes": POOL_BYTES,
                    "pool_copies": len(find_copies(hlo, kv)),
                    "kernels": find_kernels(hlo),
                }
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
