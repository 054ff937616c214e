"""Attention workloads on a device: arrays, the bytes and operations they must take, and timing.

Imports JAX and muxjax.pallas_kernels only, so that it runs where little else is installed.
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

from muxjax.pallas_kernels import LANES, KVLayout, paged_attention

LAYERS = 8
"""Layers of a workload: each call reads another one's pages, so that no cache holds them."""
_PAGE_TOKENS = 16


class AttentionGeometry(NamedTuple):
    """`N`, `K`, `H`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class AttentionWorkload:
    """Sequences of equal length, all decoded by one token or all prefilled.

    Attributes:
      geometry: of the model.
      num_seqs: `S`.
      length: tokens of each.
      decode: one query a sequence, or as many as it has tokens.
      dtype: of queries and pool.
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
        """Keys and values of one layer."""
        _, num_kv, head_dim = self.geometry
        item = jnp.dtype(self.dtype).itemsize
        return 2 * self.num_seqs * self.length * num_kv * head_dim * item

    @property
    def bytes(self) -> int:
        """What must move through memory for one layer: keys, values, queries, output, once each."""
        num_heads, _, head_dim = self.geometry
        item = jnp.dtype(self.dtype).itemsize
        return self.kv_bytes + 2 * self.num_tokens * num_heads * head_dim * item

    @property
    def operations(self) -> int:
        """Of the two products, for one layer; those that causality masks are not counted."""
        num_heads, _, head_dim = self.geometry
        pairs = self.length if self.decode else self.length * (self.length + 1) // 2
        return 4 * self.num_seqs * pairs * num_heads * head_dim

    def arrays(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """Arguments of `paged_attention` before `layer`: random, on scattered pages."""
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
        """One layer by an implementation of `paged_attention`."""

        def run(*args: Any) -> jax.Array:
            return paged_attention(
                *args,
                layout=self.layout,
                scale=self.geometry.head_dim**-0.5,
                decode=self.decode,
                implementation=implementation,
            )

        return run


def all_layers(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`LAYERS` calls one after the other: the output of each is the next one's queries.

    `attend` is called with the queries, a layer's number, and whatever else there is.
    """

    def run(q: jax.Array, *rest: Any) -> jax.Array:
        for layer in range(LAYERS):
            q = attend(q, layer, *rest)
        return q

    return jax.jit(run)


def seconds(call: Callable[[], Any], *, budget: float = 0.5, least: int = 5) -> float:
    """Median time of a call, after one to compile and two to warm up.

    A few calls are queued at a time and waited for together, so that what the host does between
    them is hidden behind the device's work.
    """
    for _ in range(3):
        jax.block_until_ready(call())
    queued = 4
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < least or (time.perf_counter() - began < budget and len(taken) < 100):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(queued)])
        taken.append((time.perf_counter() - start) / queued)
    return median(taken)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB within the device's memory."""
    x = jnp.arange(1 << 29, dtype=jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds(lambda: copy(x))


def matmul_rate(dtype: str) -> float:
    """Operations a second of a product of two random matrices, 8192 x 8192."""
    size = 8192
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / seconds(lambda: product(a, b))


def relative_error(found: jax.Array, wanted: jax.Array) -> float:
    """Norm of the difference over the norm of what is wanted."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def described(values: Sequence[Any]) -> dict[str, Any]:
    """The device and the versions that a result holds for."""
    device = jax.devices()[0]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device.device_kind,
        "jax": jax.__version__,
        "results": list(values),
    }
