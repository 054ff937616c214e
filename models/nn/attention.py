"""The two ways a decoder attends: over the pool (serving) and over its own batch (training)."""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from muxjax.pallas_kernels import KVLayout, paged_attention, write_kv

Cache = TypeVar("Cache")


@runtime_checkable
class Attend(Protocol[Cache]):
    """What a layer calls with its queries, keys and values, rotated already.

    Returns the attention output `[T, N, H]` and the cache with the layer's keys and values in it.
    """

    def __call__(
        self,
        cache: Cache,
        layer: Int[Array, ""] | int,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Float[Array, "T N H"], Cache]: ...


@struct.dataclass
class PagedAttend:
    """Attention over the shared pool; the cache is the pool itself, `[P, rows, 128]`.

    Attributes:
      first_rows: for each token the pool row (of `[P * rows, 128]`) where layer 0's keys and values
        go; layer `l`'s go `l` pages further. Padding tokens point into the dummy block.
      block_tables: first page of each block of each sequence.
      kv_lens: tokens of each sequence after this step's are written; 0 for an empty row.
      query_starts: cumulative counts of this step's tokens a sequence.
      layout: the model's geometry in the pool.
      decode: one token a sequence.
      implementation: of paged attention; None chooses by platform.
    """

    first_rows: Int[Array, " T"]
    block_tables: Int[Array, "S B"]
    kv_lens: Int[Array, " S"]
    query_starts: Int[Array, " S+1"]
    layout: KVLayout = struct.field(pytree_node=False)
    decode: bool = struct.field(pytree_node=False)
    implementation: str | None = struct.field(pytree_node=False, default=None)

    def __call__(
        self,
        cache: Float[Array, "P rows 128"],
        layer: Int[Array, ""] | int,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Float[Array, "T N H"], Float[Array, "P rows 128"]]:
        rows = self.first_rows + layer * self.layout.rows
        cache = write_kv(cache, k, v, rows, layout=self.layout)
        out = paged_attention(
            q,
            cache,
            self.block_tables,
            self.kv_lens,
            self.query_starts,
            layer,
            layout=self.layout,
            scale=scale,
            window=window,
            softcap=softcap,
            decode=self.decode,
            implementation=self.implementation,
        )
        return out, cache


@struct.dataclass
class DenseAttend:
    """Causal attention among the tokens of the step, with no pool; for training and tests.

    Attributes:
      length: tokens of each sequence; a step holds whole sequences of this length, one after
      another.
    """

    length: int = struct.field(pytree_node=False)

    def __call__(
        self,
        cache: None,
        layer: Int[Array, ""] | int,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Float[Array, "T N H"], None]:
        del layer
        num_heads, head_dim = q.shape[1:]
        num_kv = k.shape[1]
        q = q.reshape(-1, self.length, num_kv, num_heads // num_kv, head_dim)
        k = k.reshape(-1, self.length, num_kv, head_dim)
        v = v.reshape(-1, self.length, num_kv, head_dim)
        scores = jnp.einsum("bqkgh,btkh->bkgqt", q, k, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        at = jnp.arange(self.length)
        seen = at <= at[:, None]
        if window is not None:
            seen &= at > at[:, None] - window
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
        out = jnp.einsum("bkgqt,btkh->bqkgh", weights, v.astype(jnp.float32))
        return out.reshape(-1, num_heads, head_dim).astype(q.dtype), cache
