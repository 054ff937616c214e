"""Attention of a decoder layer: over the KV pool (serving), or within its batch (training)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muxjax.pallas_kernels import AttentionMetadata, AttentionOptions, paged_attention, write_kv

Cache = TypeVar("Cache")


@runtime_checkable
class Attend(Protocol[Cache]):
    """The attention function of a layer.

    Takes queries, keys and values after the rotary embedding. Returns the attention output,
    `[T, N, H]`, and the cache with the layer's keys and values written to it.
    """

    def __call__(
        self,
        cache: Cache,
        layer: Int[Array, ""] | int,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        options: AttentionOptions,
    ) -> tuple[Float[Array, "T N H"], Cache]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedAttend:
    """Attention over the shared pool; the cache is the pool itself, `[P, rows, 128]`.

    Attributes:
      first_rows: for each token, the pool row (of `[P * rows, 128]`) of its keys and values in
        layer 0; layer `l` is `l` pages further. Padding tokens point into the dummy block.
      metadata: the sequences of the step, with `kv_lens` after this step's tokens are written.
      implementation: name of the paged attention implementation; None selects it by platform.
        Static.
    """

    first_rows: Int[Array, " T"]
    metadata: AttentionMetadata
    implementation: str | None = field(default=None, metadata={"static": True})

    def __call__(
        self,
        cache: Float[Array, "P rows 128"],
        layer: Int[Array, ""] | int,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        options: AttentionOptions,
    ) -> tuple[Float[Array, "T N H"], Float[Array, "P rows 128"]]:
        layout = self.metadata.layout
        cache = write_kv(cache, k, v, self.first_rows + layer * layout.rows, layout=layout)
        out = paged_attention(
            q, cache, self.metadata, options, layer, implementation=self.implementation
        )
        return out, cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseAttend:
    """Causal attention among the tokens of the step, without a pool; for training and tests.

    Attributes:
      length: tokens of each sequence. A step holds complete sequences of this length,
        concatenated. Static.
    """

    length: int = field(metadata={"static": True})

    def __call__(
        self,
        cache: None,
        layer: Int[Array, ""] | int,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        options: AttentionOptions,
    ) -> tuple[Float[Array, "T N H"], None]:
        del layer
        num_heads, head_dim = q.shape[1:]
        num_kv, softcap = k.shape[1], options.softcap
        q = q.reshape(-1, self.length, num_kv, num_heads // num_kv, head_dim)
        k = k.reshape(-1, self.length, num_kv, head_dim)
        v = v.reshape(-1, self.length, num_kv, head_dim)
        scores = jnp.einsum("bqkgh,btkh->bkgqt", q, k, preferred_element_type=jnp.float32)
        scores = scores * options.scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        position = jnp.arange(self.length)
        visible = position <= position[:, None]
        if options.window is not None:
            visible &= position > position[:, None] - options.window
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
        out = jnp.einsum("bkgqt,btkh->bqkgh", weights, v.astype(jnp.float32))
        return out.reshape(-1, num_heads, head_dim).astype(q.dtype), cache
