"""Finds the fastest block sizes of the attention kernels on this device, for their table.

    python benchmarks/tune_attention.py             # print the result
    python benchmarks/tune_attention.py --write     # write it to pallas_kernels/gpu/tuned.py (GPU)

All geometries take about half an hour, mostly compilation; `--kind` and `--geometry` select some.
Sizes that are less than 2 % faster than the default are omitted. On a TPU, the lines are for
`TUNED` in `pallas_kernels/tpu/blocks.py`.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track

from muxjax.bench import attention_workload as bench
from muxjax.bench.attention_workload import LAYERS, AttentionGeometry, AttentionWorkload
from muxjax.pallas_kernels.gpu import tiles as mosaic_gpu_tiles
from muxjax.pallas_kernels.gpu import tuned as mosaic_gpu_tuned

GEOMETRIES = [
    AttentionGeometry(32, 8, 128),
    AttentionGeometry(32, 32, 128),
    AttentionGeometry(14, 2, 64),
    AttentionGeometry(9, 3, 64),
    AttentionGeometry(4, 1, 256),
]
WORTHWHILE = 0.98
"""Maximum time relative to the default of sizes that are listed."""
_TABLE = Path(mosaic_gpu_tuned.__file__)


def geometry(text: str) -> AttentionGeometry:
    """Parses `N,K,H`."""
    return AttentionGeometry(*(int(part) for part in text.split(",")))


def workload(geometry: AttentionGeometry, decode: bool) -> AttentionWorkload:
    """Returns the workload for which sizes are tuned."""
    return AttentionWorkload(geometry, 32 if decode else 4, 2048, decode)


def gpu_candidates(work: AttentionWorkload) -> Iterator[tuple[int, int, int, int]]:
    """Yields combinations of warpgroups, tokens, stages and waves that fit shared memory."""
    warpgroups = (1,) if work.decode else (1, 2)
    waves = (1, 2, 3, 4, 6) if work.decode else (3,)
    for sizes in itertools.product(warpgroups, (32, 64, 128), (1, 2, 3, 4, 6), waves):
        tiles = mosaic_gpu_tiles.Tiles(work.layout, jnp.dtype(work.dtype), *sizes)
        if tiles.shared_memory <= mosaic_gpu_tiles.SHARED_MEMORY:
            yield sizes


def layer_seconds(work: AttentionWorkload, arrays: tuple[jax.Array, ...]) -> float:
    """Seconds of one layer with the current sizes of the table."""
    q, *rest = arrays
    attend = work.attend(None)
    layers = bench.all_layers(lambda q, layer, *rest: attend(q, *rest, jnp.int32(layer)))
    return bench.seconds(lambda: layers(q, *rest), budget=0.1) / LAYERS


def tune(
    work: AttentionWorkload,
    table: dict[Any, Any],
    key: Any,
    candidates: list[Any],
    console: Console,
) -> Any | None:
    """Returns the fastest candidate if it is faster than the default, else None."""
    arrays = work.arrays()
    table.pop(key, None)
    default = layer_seconds(work, arrays)
    times = {}
    for sizes in track(candidates, f"{work.geometry} {work.kind}", console=console):
        table[key] = sizes
        try:
            times[sizes] = layer_seconds(work, arrays)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            console.print(f"  {sizes}: {str(error).splitlines()[0][:120]}")
        finally:
            del table[key]
    if not times:
        return None
    best = min(times, key=lambda sizes: times[sizes])
    relative = times[best] / default
    console.print(
        f"{work.geometry} {work.kind}: default {default * 1e6:.1f} us, best {best} "
        f"{times[best] * 1e6:.1f} us"
    )
    return best if relative < WORTHWHILE else None


def tune_gpu(works: list[AttentionWorkload], console: Console) -> dict[Any, Any]:
    """Returns lines for `TUNED` in gpu/tuned.py."""
    kind = jax.devices()[0].device_kind
    tuned = {}
    for work in works:
        key = (kind, work.layout.num_kv_heads, work.layout.padded_head_dim, work.decode)
        best = tune(work, mosaic_gpu_tuned.TUNED, key, list(gpu_candidates(work)), console)
        if best is not None:
            tuned[key] = best
    return tuned


def tune_tpu(works: list[AttentionWorkload], console: Console) -> dict[Any, Any]:
    """Returns lines for `TUNED` in tpu/blocks.py."""
    from muxjax.pallas_kernels.tpu import blocks

    kind = jax.devices()[0].device_kind
    tuned = {}
    for work in works:
        key = blocks.BlockGeometry(kind, work.kind, *work.geometry, work.layout.rows, work.dtype)
        queries = (1,) if work.decode else (32, 64, 128, 256)
        candidates = list(itertools.product((1, 2, 4, 8, 16, 32), queries))
        best = tune(work, blocks.TUNED, key, candidates, console)
        if best is not None:
            tuned[key] = best
    return tuned


def write(tuned: dict[Any, Any]) -> None:
    """Adds the entries to the table; replaces entries with the same key."""
    rows = mosaic_gpu_tuned.TUNED | tuned
    lines = [f'    ("{k}", {n}, {h}, {d}): {v},' for (k, n, h, d), v in rows.items()]
    body = "\n".join(["= {", *lines, "}"]) if lines else "= {}"
    text = _TABLE.read_text()
    _TABLE.write_text(re.sub(r"(?<=\]\] )= \{.*?\}$", body, text, flags=re.DOTALL | re.MULTILINE))


def main() -> None:
    """Measures, prints, and writes the table if requested."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("decode", "prefill"), help="only this kind of step")
    parser.add_argument("--geometry", metavar="N,K,H", type=geometry, help="only this geometry")
    parser.add_argument("--write", action="store_true", help="write the table (GPU only)")
    options = parser.parse_args()
    backend = jax.default_backend()
    if backend == "cpu":
        sys.exit("no accelerator here: these kernels are for GPUs and TPUs")
    if options.write and backend != "gpu":
        sys.exit("--write is for GPUs; paste the printed lines into pallas_kernels/tpu/blocks.py")
    geometries = GEOMETRIES if options.geometry is None else [options.geometry]
    works = [
        workload(geometry, decode)
        for geometry, decode in itertools.product(geometries, (True, False))
        if options.kind in (None, "decode" if decode else "prefill")
    ]
    tuned = (tune_gpu if backend == "gpu" else tune_tpu)(works, Console(stderr=True))
    for key, sizes in tuned.items():
        print(f"{key!r}: {sizes!r},")
    if options.write:
        write(tuned)
        print(f"written to {_TABLE}", file=sys.stderr)


if __name__ == "__main__":
    main()
