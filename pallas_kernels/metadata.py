"""Arguments of paged attention: sequences of a step, options of a layer, and static properties."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muxjax.pallas_kernels.layout import LANES, KVLayout
from muxjax.pallas_kernels.target import KernelTarget


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMetadata:
    """The sequences of one step, the same for all layers. A pytree.

    The queries of sequence `s` are rows `query_starts[s]` up to `query_starts[s + 1]` of the packed
    queries. They are the last tokens of its context, whose keys and values are already in the pool:
    of `n` queries, the `i`-th is at position `kv_lens[s] - n + i`.

    Attributes:
      block_tables: first page of each block of each sequence; layer `l` reads page `first + l`.
        Entries past a sequence's length may be any page of the pool.
      kv_lens: tokens in each context, including the queries; 0 for an empty row.
      query_starts: cumulative counts of queries. Packed queries past the last are padding.
      layout: the model's geometry in the pool. Static.
      decode: whether each sequence has one query, so `T == S` and row `s` is the query of sequence
        `s`. Static.
    """

    block_tables: Int[Array, "S B"]
    kv_lens: Int[Array, " S"]
    query_starts: Int[Array, " S+1"]
    layout: KVLayout = field(metadata={"static": True})
    decode: bool = field(default=False, metadata={"static": True})

    def validate(self, q: Float[Array, "T N H"], kv: Float[Array, "P rows 128"]) -> None:
        """Checks queries and pool against the layout and the number of sequences.

        Raises:
          ValueError: the shapes do not match.
        """
        layout, (num_tokens, num_heads, head_dim) = self.layout, q.shape
        num_seqs = self.block_tables.shape[0]
        if kv.shape[1:] != (layout.rows, LANES):
            raise ValueError(
                f"pool of shape {kv.shape}; {layout} needs [pages, {layout.rows}, {LANES}]"
            )
        if head_dim != layout.head_dim or num_heads % layout.num_kv_heads:
            raise ValueError(f"queries of shape {q.shape} do not match {layout}")
        if self.kv_lens.shape != (num_seqs,) or self.query_starts.shape != (num_seqs + 1,):
            raise ValueError(
                f"{num_seqs} block tables, but kv_lens {self.kv_lens.shape} and query_starts "
                f"{self.query_starts.shape}"
            )
        if self.decode and num_tokens != num_seqs:
            raise ValueError(
                f"decode needs one query per sequence: {num_tokens} queries for {num_seqs} "
                "sequences"
            )


@dataclass(frozen=True)
class AttentionOptions:
    """The options of a layer's attention. Static: part of the compiled program.

    Attributes:
      scale: multiplies the products of queries and keys.
      window: number of positions visible to a query, including its position; None for all.
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2); None for no cap.

    Raises:
      ValueError: the window is below 1.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, not {self.window}")


@dataclass(frozen=True)
class AttentionRequest:
    """The static properties of a call, which determine whether an implementation supports it.

    Attributes:
      target: the device that the call is traced for.
      layout: the model's geometry in the pool.
      num_heads: `N`, query heads.
      q_dtype, kv_dtype: types of the queries and of the pool.
      decode: whether each sequence has one query.
    """

    target: KernelTarget
    layout: KVLayout
    num_heads: int
    q_dtype: jnp.dtype
    kv_dtype: jnp.dtype
    decode: bool
