"""Paged attention relative to the limits of the device, and to other implementations.

Decode is limited by memory, so it is compared with the bandwidth of a plain copy in the same run.
Prefill is limited by arithmetic, so it is compared with the rate of a large matrix product.
Before a kernel is timed, its output is compared with the `xla` implementation.

    python benchmarks/attention.py                  # a table; under ten minutes on an H200
    python benchmarks/attention.py --json > attention-h200.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

# Before JAX starts: leaves memory for torch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from muxjax.bench import attention_workload as bench
from muxjax.bench.attention_workload import LAYERS, AttentionGeometry, AttentionWorkload

LLAMA = AttentionGeometry(32, 8, 128)
WORKLOADS = [
    *(
        AttentionWorkload(LLAMA, s, length, True)
        for s, length in [(1, 2048), (1, 32768), (8, 2048)]
    ),
    *(AttentionWorkload(LLAMA, s, 2048, True) for s in (32, 64, 128)),
    AttentionWorkload(LLAMA, 32, 512, True),
    AttentionWorkload(LLAMA, 32, 8192, True),
    AttentionWorkload(AttentionGeometry(32, 32, 128), 32, 2048, True),
    AttentionWorkload(AttentionGeometry(64, 8, 128), 32, 2048, True),
    AttentionWorkload(AttentionGeometry(14, 2, 64), 64, 2048, True),
    AttentionWorkload(AttentionGeometry(9, 3, 64), 64, 2048, True),
    AttentionWorkload(AttentionGeometry(4, 1, 256), 64, 2048, True),
    AttentionWorkload(LLAMA, 4, 2048, False),
    AttentionWorkload(LLAMA, 1, 8192, False),
    AttentionWorkload(AttentionGeometry(9, 3, 64), 4, 2048, False),
    AttentionWorkload(AttentionGeometry(4, 1, 256), 4, 2048, False),
]
TOLERANCE = 2e-2

Timed = Callable[[], float]
"""Seconds of one layer."""


def time_paged(workload: AttentionWorkload, implementation: str | None) -> tuple[Timed, jax.Array]:
    """Returns a timed call of an implementation of `paged_attention`, and an output."""
    q, *rest = workload.arrays()
    attend = workload.attend(implementation)
    layers = bench.all_layers(lambda q, layer, *rest: attend(q, *rest, jnp.int32(layer)))
    once = jax.jit(attend)(q, *rest, jnp.int32(1))
    return lambda: bench.seconds(lambda: layers(q, *rest)) / LAYERS, once


def shipped_paged(workload: AttentionWorkload) -> Timed:
    """JAX's `paged_attention` for GPUs: head-major pages, one array for each layer."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    q, _, _, lens, _ = workload.arrays()
    _, num_kv, head_dim = workload.geometry
    blocks = workload.length // 16
    shape = (num_kv, workload.num_seqs * blocks, 16, head_dim)
    pages = [_random(shape, workload.dtype, i) for i in range(2 * LAYERS)]
    tables = jnp.arange(workload.num_seqs * blocks, dtype=jnp.int32)
    tables = jax.random.permutation(jax.random.key(0), tables).reshape(workload.num_seqs, blocks)
    splits = max(n for n in (1, 2, 4, 8, 16) if blocks % n == 0)

    def attend(q: jax.Array, layer: int, *pages: jax.Array) -> jax.Array:
        k, v = pages[2 * layer : 2 * layer + 2]
        q = q * head_dim**-0.5
        return paged_attention(q.astype(k.dtype), k, v, tables, lens, k_splits=splits)

    layers = bench.all_layers(attend)
    return lambda: bench.seconds(lambda: layers(q, *pages)) / LAYERS


def dense(workload: AttentionWorkload, implementation: Literal["xla", "cudnn"]) -> Timed:
    """`jax.nn.dot_product_attention` over a dense cache `[S, length, K, H]`."""
    num_heads, num_kv, head_dim = workload.geometry
    queries = 1 if workload.decode else workload.length
    q = _random((workload.num_seqs, queries, num_heads, head_dim), workload.dtype, 99)
    shape = (workload.num_seqs, workload.length, num_kv, head_dim)
    caches = [_random(shape, workload.dtype, i) for i in range(2 * LAYERS)]

    def attend(q: jax.Array, layer: int, *caches: jax.Array) -> jax.Array:
        k, v = caches[2 * layer : 2 * layer + 2]
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=not workload.decode, implementation=implementation
        )

    layers = bench.all_layers(attend)
    return lambda: bench.seconds(lambda: layers(q, *caches)) / LAYERS


def torch_sdpa(workload: AttentionWorkload) -> Timed:
    """PyTorch's `scaled_dot_product_attention` over a dense cache `[S, K, length, H]`."""
    import torch

    num_heads, num_kv, head_dim = workload.geometry
    queries = 1 if workload.decode else workload.length
    dtype = getattr(torch, workload.dtype)

    def random(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", dtype=dtype)

    q = random(workload.num_seqs, num_heads, queries, head_dim)
    shape = (workload.num_seqs, num_kv, workload.length, head_dim)
    caches = [(random(*shape), random(*shape)) for _ in range(LAYERS)]

    def layers() -> None:
        x = q
        for k, v in caches:
            x = torch.nn.functional.scaled_dot_product_attention(
                x, k, v, is_causal=not workload.decode, enable_gqa=num_heads != num_kv
            )

    def call() -> None:
        layers()
        torch.cuda.synchronize()

    return lambda: bench.seconds(call) / LAYERS


def _random(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def contenders(workload: AttentionWorkload) -> Iterator[tuple[str, Callable[[], Timed]]]:
    """Yields the names of other implementations, and functions that prepare them."""
    if jax.default_backend() == "gpu":
        if workload.decode:
            yield "jax paged", lambda: shipped_paged(workload)
        yield "jax cudnn", lambda: dense(workload, "cudnn")
        yield "torch sdpa", lambda: torch_sdpa(workload)
    yield "jax dense", lambda: dense(workload, "xla")


def measure(
    workload: AttentionWorkload, bandwidth: float, rate: float, peers: bool
) -> dict[str, Any]:
    """Measures one workload; returns a row of the table."""
    timed, output = time_paged(workload, None)
    _, expected = time_paged(workload, "xla")
    error = bench.relative_error(output, expected)
    if not error < TOLERANCE:
        raise SystemExit(f"{workload}: the relative error is {error:.1e}; nothing was timed")
    seconds = timed()
    limit = max(workload.bytes / bandwidth, workload.operations / rate)
    line: dict[str, Any] = {
        "geometry": list(workload.geometry),
        "kind": workload.kind,
        "num_seqs": workload.num_seqs,
        "length": workload.length,
        "bytes": workload.bytes,
        "operations": workload.operations,
        "error": error,
        "seconds": seconds,
        "fraction_of_copy": workload.bytes / seconds / bandwidth,
        "fraction_of_matmul": workload.operations / seconds / rate,
        "fraction_of_limit": limit / seconds,
        "peers": {},
    }
    for name, prepare in contenders(workload) if peers else ():
        try:
            line["peers"][name] = prepare()()
        except Exception as refusal:  # noqa: BLE001  peers may not support a workload
            line["peers"][name] = None
            print(f"{name} on {workload}: {str(refusal).splitlines()[0][:200]}", file=sys.stderr)
    return line


def table(lines: list[dict[str, Any]]) -> Table:
    """Builds the table of the rows."""
    names = sorted({name for line in lines for name in line["peers"]})
    columns = ["N, K, H", "", "sequences", "MB", "us", "of copy", "of matmul", *names]
    grid = Table(*columns, title="one layer; peers: their time over MuxJAX's")
    for line in lines:
        peers = [line["peers"].get(name) for name in names]
        grid.add_row(
            ", ".join(map(str, line["geometry"])),
            line["kind"],
            f"{line['num_seqs']} x {line['length']}",
            f"{line['bytes'] / 1e6:.0f}",
            f"{line['seconds'] * 1e6:.1f}",
            f"{line['fraction_of_copy']:.0%}",
            f"{line['fraction_of_matmul']:.0%}",
            *("-" if peer is None else f"{peer / line['seconds']:.2f}" for peer in peers),
        )
    return grid


def main() -> None:
    """Measures the workloads and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("decode", "prefill"), help="only these workloads")
    parser.add_argument(
        "--no-peers", action="store_true", help="only the implementations of this project"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    options = parser.parse_args()
    if jax.default_backend() == "cpu":
        sys.exit("no accelerator here: these kernels are for GPUs and TPUs")
    workloads = [w for w in WORKLOADS if options.kind in (None, w.kind)]
    bandwidth, rate = bench.copy_bandwidth(), bench.matmul_rate("bfloat16")
    stderr = Console(stderr=True)
    lines = [
        measure(workload, bandwidth, rate, not options.no_peers)
        for workload in track(workloads, "measuring", console=stderr)
    ]
    if options.json:
        rates = {"copy_bytes_per_second": bandwidth, "matmul_operations_per_second": rate}
        print(json.dumps(bench.build_report(lines) | rates, indent=1))
    else:
        console = Console()
        device = jax.devices()[0].device_kind
        console.print(
            f"{device}, JAX {jax.__version__}: copy {bandwidth / 1e12:.2f} TB/s (read + written), "
            f"matmul {rate / 1e12:.0f} TFLOP/s (bfloat16)"
        )
        console.print(table(lines))


if __name__ == "__main__":
    main()
