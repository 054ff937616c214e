"""Attention workloads on a device: arrays, minimum memory traffic, operation counts and timing.

Imports only JAX, NumPy and `muxjax.pallas_kernels`, so that it runs with few packages installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.pallas_kernels import (
    LANES,
    AttentionMetadata,
    AttentionOptions,
    KVLayout,
    paged_attention,
)

LAYERS = 8
"""Layers of a workload: each call reads another layer's pages, so that caches are cold."""
_PAGE_TOKENS = 16


class AttentionGeometry(NamedTuple):
    """Query heads `N`, key/value heads `K`, and head size `H`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class AttentionWorkload:
    """Sequences of equal length that all decode one token or are all prefilled.

    Attributes:
      geometry: heads of the model.
      num_seqs: number of sequences, `S`.
      length: tokens of each sequence.
      decode: True: one query per sequence; False: one query per token.
      dtype: type of the queries and the pool.
    """

    geometry: AttentionGeometry
    num_seqs: int
    length: int
    decode: bool
    dtype: str = "bfloat16"

    @property
    def kind(self) -> str:
        return "decode" if self.decode else "prefill"

    @property
    def num_tokens(self) -> int:
        return self.num_seqs if self.decode else self.num_seqs * self.length

    @property
    def layout(self) -> KVLayout:
        rows = KVLayout(10**6, *self.geometry[1:]).rows_per_token * _PAGE_TOKENS
        return KVLayout(rows, *self.geometry[1:])

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one layer."""
        _, num_kv, head_dim = self.geometry
        item = jnp.dtype(self.dtype).itemsize
        return 2 * self.num_seqs * self.length * num_kv * head_dim * item

    @property
    def bytes(self) -> int:
        """Minimum memory traffic of one layer: keys, values, queries and output, once each."""
        num_heads, _, head_dim = self.geometry
        item = jnp.dtype(self.dtype).itemsize
        return self.kv_bytes + 2 * self.num_tokens * num_heads * head_dim * item

    @property
    def operations(self) -> int:
        """Operations of the two matrix products of one layer, without masked pairs."""
        num_heads, _, head_dim = self.geometry
        pairs = self.length if self.decode else self.length * (self.length + 1) // 2
        return 4 * self.num_seqs * pairs * num_heads * head_dim

    def arrays(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """Random arguments of `attend`'s function, without `layer`.

        Returns:
          Queries [tokens, N, H], pool [pages, rows, LANES], block tables [S, blocks] of scattered
            blocks, lengths [S] and query offsets [S + 1].
        """
        layout = self.layout
        blocks = -(-self.length // layout.tokens_per_page)
        pages = (self.num_seqs * blocks + 1) * LAYERS
        key = jax.random.key(seed)
        shape = (pages, layout.rows, LANES)
        kv = jax.jit(lambda k: jax.random.normal(k, shape, self.dtype))(key)
        q = jax.random.normal(
            jax.random.fold_in(key, 1), (self.num_tokens, *self.geometry[::2]), self.dtype
        )
        order = np.random.default_rng(seed).permutation(np.arange(1, self.num_seqs * blocks + 1))
        tables = (order.reshape(self.num_seqs, blocks) * LAYERS).astype(np.int32)
        lens = np.full(self.num_seqs, self.length, np.int32)
        step = 1 if self.decode else self.length
        starts = np.arange(self.num_seqs + 1, dtype=np.int32) * step
        return q, kv, jnp.asarray(tables), jnp.asarray(lens), jnp.asarray(starts)

    def attend(self, implementation: str | None) -> Callable[..., jax.Array]:
        """A function that computes one layer with an implementation of `paged_attention`."""
        options = AttentionOptions(self.geometry.head_dim**-0.5)

        def run(q: Any, kv: Any, tables: Any, lens: Any, starts: Any, layer: Any) -> jax.Array:
            metadata = AttentionMetadata(tables, lens, starts, self.layout, self.decode)
            return paged_attention(q, kv, metadata, options, layer, implementation=implementation)

        return run


def all_layers(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Compiles `LAYERS` calls in sequence: the output of each call is the query of the next one.

    `attend` is called with the queries, the layer's index, and the remaining arguments.
    """

    def run(q: jax.Array, *rest: Any) -> jax.Array:
        for layer in range(LAYERS):
            q = attend(q, layer, *rest)
        return q

    return jax.jit(run)


def seconds(call: Callable[[], Any], *, budget: float = 0.5, min_samples: int = 5) -> float:
    """Median seconds of a call, after one call to compile and two to warm up.

    Four calls are queued at a time, so that host work overlaps with device work.
    """
    for _ in range(3):
        jax.block_until_ready(call())
    queued = 4
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < min_samples or (
        time.perf_counter() - began < budget and len(samples) < 100
    ):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(queued)])
        samples.append((time.perf_counter() - start) / queued)
    return median(samples)


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a copy of 2 GiB in device memory."""
    x = jnp.arange(1 << 29, dtype=jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds(lambda: copy(x))


def matmul_rate(dtype: str) -> float:
    """Operations per second of a product of two random 8192 x 8192 matrices."""
    size = 8192
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / seconds(lambda: product(a, b))


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    """Norm of the difference over the norm of the expected array."""
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


def build_report(results: Sequence[Any]) -> dict[str, Any]:
    """The results with their date, device and JAX version."""
    device = jax.devices()[0]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device.device_kind,
        "jax": jax.__version__,
        "results": list(results),
    }
