"""Common parts of the Mosaic GPU kernels: shared memory, queries, output, and the online softmax.

A block of threads consists of warpgroups (128 threads). The last one fetches tiles of keys and
values into a ring of `stages` slots (`producer`); the others attend to them. Two barriers guard
each slot: `ready` signals that its tile has arrived, `free` that all readers are done. The softmax
is online (Milakov and Gimelshein 2018), as in FlashAttention (Dao et al. 2022), in base 2.

Rows that must not be read (past a sequence's length, before its window) may contain any value,
including NaN, and 0 x NaN is NaN. Scores of such keys are replaced by `MASKED`; the producer sets
such rows of values to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from muxjax.pallas_kernels.gpu.tiles import COLUMNS, ROWS, Tiles

MASKED = -1e30
"""The score of masked positions; finite, so that a fully masked row does not become NaN."""
_LOG2E = math.log2(math.e)

Scalar = Int[Array, ""]
Mask = Callable[[Scalar], Bool[Array, "rows tokens"]]
"""Returns the mask of a tile's visible positions, from the tile's index."""


@dataclass(frozen=True)
class Buffers:
    """Shared memory and barriers of a block; see `scratch_types` for shapes.

    Attributes:
      keys, values: rings of swizzled tiles.
      queries: each warpgroup's queries, swizzled.
      plain_queries: each warpgroup's queries as fetched.
      out: a block of columns of each warpgroup's output.
      staging: tiles of keys and values as fetched; None for direct tiles.
      ready, free: barriers of the slots of `keys` (index 0) and `values` (index 1).
      staged: barriers of the copies to `staging`.
      queries_in: barriers of the copies of queries.
      weights: softmax weights, for the interpreter only; else None.
    """

    keys: Any
    values: Any
    queries: Any
    plain_queries: Any
    out: Any
    staging: Any
    ready: Any
    free: Any
    staged: Any
    queries_in: Any
    weights: Any


def _swizzled(tiles: Tiles, *shape: int) -> Any:
    # JAX's transforms leave `transform_array` abstract; memory references do not call it.
    tiling = plgpu.TilingTransform((8, tiles.swizzle // 2))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(tiles.swizzle)  # type: ignore[abstract]
    return plgpu.SMEM(shape, tiles.part_dtype, transforms=(tiling, swizzle))


def scratch_types(tiles: Tiles, out_dtype: jnp.dtype) -> list[Any]:
    """Types of a kernel's scratch memory, in the order of the fields of `Buffers`."""
    t = tiles
    ring = _swizzled(t, t.stages, t.parts, t.tokens, t.width)
    arrivals = t.chunks if t.direct else 1
    return [
        ring,
        ring,
        _swizzled(t, t.warpgroups, t.parts, ROWS, t.width),
        plgpu.SMEM((t.warpgroups, ROWS, t.query_columns), t.dtype),
        plgpu.SMEM((t.warpgroups, ROWS, COLUMNS), out_dtype),
        None if t.direct else plgpu.SMEM((2, t.tokens, t.width), t.dtype),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=(2, t.stages)),
        plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=(2, t.stages)),
        plgpu.Barrier(num_arrivals=t.chunks, num_barriers=2),
        plgpu.Barrier(num_barriers=t.warpgroups),
        _swizzled(t, t.warpgroups, t.parts, ROWS, t.tokens) if t.interpreted else None,
    ]


def split_parts(x: Array, tiles: Tiles) -> list[Array]:
    """Splits `x` into 16-bit arrays that sum to it: itself, or three in bfloat16."""
    if tiles.parts == 1:
        return [x.astype(tiles.part_dtype)]
    parts = []
    for _ in range(tiles.parts):
        parts.append(x.astype(tiles.part_dtype))
        x = x - parts[-1].astype(jnp.float32)
    return parts


def reallocate_registers(tiles: Tiles, *, producer: bool) -> None:
    """Moves registers from the producer to the computing warpgroups if there are two of them.

    A multiprocessor's 65,536 registers give each thread of three warpgroups 168;
    2 x 232 + 40 = 3 x 168.
    """
    if tiles.warpgroups == 2:
        if producer:
            plgpu.set_max_registers(40, action="decrease")
        else:
            plgpu.set_max_registers(232, action="increase")


def load_queries(
    tiles: Tiles,
    buffers: Buffers,
    warpgroup: Scalar,
    rows: int,
    source: Callable[[Any], Any],
) -> None:
    """Fetches a warpgroup's queries and stores them swizzled, as `wgmma` reads them.

    Args:
      tiles: shapes.
      buffers: the block's buffers.
      warpgroup: index of the warpgroup.
      rows: rows to fetch. Later rows of the operand are unset; they affect only their own rows of
        scores, which are not stored.
      source: maps a slice of columns to queries in device memory, `[rows, columns]`.
    """
    plain = buffers.plain_queries
    arrived = buffers.queries_in.at[warpgroup]
    for start in range(0, tiles.width, tiles.query_columns):
        columns = pl.ds(start, tiles.query_columns)
        plgpu.copy_gmem_to_smem(source(columns), plain.at[warpgroup, pl.ds(0, rows)], arrived)
        plgpu.barrier_wait(arrived)
        x = plgpu.load(plain.at[warpgroup], layout=plgpu.Layout.WGMMA, optimized=False)
        for i, part in enumerate(split_parts(x, tiles)):
            buffers.queries[warpgroup, i, :, columns] = part
        plgpu.commit_smem()


def store_output(
    buffers: Buffers,
    warpgroup: Scalar,
    output: Float[Array, "rows width"],
    copy: Callable[[Any, Any], None],
) -> None:
    """Copies a warpgroup's output to device memory, `COLUMNS` columns at a time.

    Args:
      buffers: the block's buffers.
      warpgroup: index of the warpgroup.
      output: the warpgroup's output.
      copy: starts the copies of `[ROWS, COLUMNS]` in shared memory to a slice of columns.
    """
    plain = buffers.out
    for start in range(0, output.shape[1], COLUMNS):
        block = output[:, start : start + COLUMNS].astype(plain.dtype)
        plain[warpgroup] = block
        plgpu.commit_smem()
        copy(plain.at[warpgroup], pl.ds(start, COLUMNS))
        plgpu.wait_smem_to_gmem(0)


@dataclass(frozen=True)
class Scoring:
    """Turns products of queries and keys into scores in base 2.

    Attributes:
      scale: multiplies the products.
      softcap: scores become `softcap * tanh(scores / softcap)`; None for no cap.
    """

    scale: float
    softcap: float | None

    def __call__(self, products: Float[Array, "rows tokens"]) -> Float[Array, "rows tokens"]:
        """Scores in base 2: the softmax normalizes their powers of 2."""
        if self.softcap is None:
            return products * (self.scale * _LOG2E)
        # tanh by the exponential: the hardware's `tanh.approx` is accurate to 11 bits only.
        power = jnp.exp2(products * (2 * self.scale / self.softcap * _LOG2E))
        return (1 - 2 / (1 + power)) * (self.softcap * _LOG2E)


State = tuple[Float[Array, "rows width"], Float[Array, " rows"], Float[Array, " rows"]]
"""Weighted sum of values, maximum score, and denominator, of each row."""


def initial_state(tiles: Tiles) -> State:
    """The softmax of an empty set of positions."""
    column = plgpu.Layout.WGMMA.reduce(1)
    return (
        plgpu.layout_cast(jnp.zeros((ROWS, tiles.width), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), column),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), column),
    )


def attend(
    tiles: Tiles,
    buffers: Buffers,
    warpgroup: Scalar,
    scoring: Scoring,
    mask: Mask | None,
    ring_start: Scalar,
    first: Scalar,
    last: Scalar,
    state: State,
) -> State:
    """Attends to tiles `first` up to `last`, exclusive.

    Args:
      tiles: shapes.
      buffers: the block's buffers.
      warpgroup: index of this warpgroup.
      scoring: turns products into scores.
      mask: returns the visible positions; None if all are visible.
      ring_start: the tile in the first slot.
      first: the first tile.
      last: one past the last tile.
      state: the softmax of earlier tiles.
    """
    t = tiles
    queries = buffers.queries.at[warpgroup]

    def add_values(acc: Array, weights: Array, values: Any) -> Array:
        """`acc` plus the weighted sum of a tile's values."""
        parts = split_parts(weights, t)
        if buffers.weights is None:

            def add(acc_ref: Any) -> None:
                for a, b in t.products:
                    plgpu.wgmma(acc_ref, parts[a], values.at[b])

            return pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(acc))

        # For the interpreter only: see `Tiles.interpreted`.
        shared = buffers.weights.at[warpgroup]
        for i, part in enumerate(parts):
            shared[i] = part
        plgpu.commit_smem()

        def sums(acc_ref: Any) -> Array:
            for a, b in t.products:
                plgpu.wgmma(acc_ref, shared.at[a], values.at[b])
            return acc_ref[...]

        return acc + pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef((ROWS, t.width), jnp.float32))

    def step(tile: Scalar, state: State) -> State:
        acc, maximum, denominator = state
        slot = lax.rem(tile - ring_start, t.stages)
        keys, values = buffers.keys.at[slot], buffers.values.at[slot]

        def products(acc_ref: Any) -> Array:
            for a, b in t.products:
                plgpu.wgmma(acc_ref, queries.at[a], keys.at[b].transpose((1, 0)))
            return acc_ref[...]

        plgpu.barrier_wait(buffers.ready.at[0, slot])
        s = scoring(
            pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((ROWS, t.tokens), jnp.float32))
        )
        plgpu.barrier_arrive(buffers.free.at[0, slot])
        visible = None if mask is None else mask(tile)
        if visible is not None:
            s = jnp.where(visible, s, MASKED)
        new = jnp.maximum(maximum, s.max(axis=1))
        decay = jnp.exp2(maximum - new)
        weights = jnp.exp2(s - lax.broadcast_in_dim(new, s.shape, [0]))
        if visible is not None:
            weights = jnp.where(visible, weights, 0.0)
        denominator = denominator * decay + weights.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        plgpu.barrier_wait(buffers.ready.at[1, slot])
        acc = add_values(acc, weights, values)
        plgpu.barrier_arrive(buffers.free.at[1, slot])
        return acc, new, denominator

    return lax.fori_loop(first, last, step, state)
