"""The producer of the Mosaic GPU kernels: fetches tiles of keys and values to shared memory.

The producer is the last warpgroup of a block. It fetches tiles with TMA (the tensor memory
accelerator) into the rings of `core.Buffers`, and signals `ready` when a tile is complete. The
tensor cores sum all rows of values, so rows that must not be read are set to zero first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from muxjax.pallas_kernels.gpu.core import Buffers, Scalar, split_parts
from muxjax.pallas_kernels.gpu.tiles import Tiles

_UNROLLED = 8
"""Maximum number of copies issued together, after the page numbers of all have been loaded."""


@dataclass(frozen=True)
class ContextProducer:
    """Fetches the keys and values of one sequence for one KV head.

    Attributes:
      tiles: shapes.
      table: block tables in device memory, `[S, B]`.
      pool: the pool, in `Tiles.page_view`.
      sequence, layer, kv_head: indices.
      lowest, length: positions that may be read: from `lowest` up to `length`, exclusive.
    """

    tiles: Tiles
    table: Any
    pool: Any
    sequence: Scalar
    layer: Scalar
    kv_head: Scalar
    lowest: Scalar
    length: Scalar

    def fetch(self, tile: Scalar, which: int, destination: Any, barrier: Any) -> None:
        """Starts the copies, one per chunk, of one tile of keys (`which` 0) or values (1)."""
        t = self.tiles
        head = t.layout.padded_head_dim
        column = (which * t.layout.num_kv_heads + self.kv_head) * head
        per_page = t.layout.tokens_per_page // t.chunk
        last = self.table.shape[1] - 1

        def locate(i: Scalar | int) -> tuple[Scalar, Scalar]:
            chunk = tile * t.chunks + i
            page = self.table[self.sequence, jnp.minimum(chunk // per_page, last)] + self.layer
            return page, chunk % per_page * t.chunk

        def copy(i: Scalar | int, page: Scalar, token: Scalar) -> None:
            # A page that is not a multiple of tokens is viewed as one row; its tokens are copied
            # separately.
            row, start = (token, 0) if t.whole_tokens else (0, token * t.token_width)
            plgpu.copy_gmem_to_smem(
                self.pool.at[page, pl.ds(row, t.chunk), pl.ds(start + column, t.width)],
                destination.at[pl.ds(i * t.chunk, t.chunk)],
                barrier,
            )

        if t.chunks <= _UNROLLED:
            for i, location in enumerate([locate(i) for i in range(t.chunks)]):
                copy(i, *location)
        else:

            @pl.loop(0, t.chunks)
            def _copy(i: Scalar) -> None:
                copy(i, *locate(i))

    def produce(self, buffers: Buffers, first: Scalar, last: Scalar) -> None:
        """Fetches tiles `first` up to `last`, exclusive, as their slots become free."""
        if self.tiles.direct:
            self._produce_direct(buffers, first, last)
        else:
            self._produce_staged(buffers, first, last)

    def _rewrite(self, tile: Scalar, source: Any, parts: Any) -> None:
        """Writes the 16-bit parts of a tile's rows, with zeros for rows that must not be read.

        Works on a few rows at a time, since the producer has few registers.

        Args:
          tile: index of the tile.
          source: the tile as fetched, `[tokens, width]`.
          parts: destination, `[parts, tokens, width]`, swizzled.
        """
        t = self.tiles
        rows = t.rewritten_rows
        layout = plgpu.Layout.SMEM_GMEM_COPY((rows, t.width), t.part_dtype, t.swizzle)

        @pl.loop(0, t.tokens // rows)
        def _rows(i: Scalar) -> None:
            block = pl.ds(pl.multiple_of(i * rows, rows), rows)
            position = tile * t.tokens + i * rows
            position += plgpu.broadcasted_iota(jnp.int32, (rows, t.width), 0, layout=layout)
            x = plgpu.load(source.at[block], layout=layout, optimized=False)
            valid = (position >= self.lowest) & (position < self.length)
            x = jnp.where(valid, x, jnp.zeros_like(x))
            for j, part in enumerate(split_parts(x, t)):
                parts[j, block] = part

        plgpu.commit_smem()

    def _produce_direct(self, buffers: Buffers, first: Scalar, last: Scalar) -> None:
        t = self.tiles
        staged = buffers.staged.at[0]

        @pl.loop(first, last)
        def _tile(tile: Scalar) -> None:
            n = tile - first
            slot = lax.rem(n, t.stages)
            all_valid = (tile * t.tokens >= self.lowest) & ((tile + 1) * t.tokens <= self.length)

            @pl.when(n >= t.stages)
            def _keys_free() -> None:
                plgpu.barrier_wait(buffers.free.at[0, slot])

            self.fetch(tile, 0, buffers.keys.at[slot, 0], buffers.ready.at[0, slot])

            @pl.when(n >= t.stages)
            def _values_free() -> None:
                plgpu.barrier_wait(buffers.free.at[1, slot])

            values, ready = buffers.values.at[slot, 0], buffers.ready.at[1, slot]

            @pl.when(all_valid)
            def _unmasked() -> None:
                self.fetch(tile, 1, values, ready)

            @pl.when(jnp.logical_not(all_valid))
            def _zero_invalid() -> None:
                self.fetch(tile, 1, values, staged)
                plgpu.barrier_wait(staged)
                self._rewrite(tile, values, buffers.values.at[slot])
                for _ in range(t.chunks):
                    plgpu.barrier_arrive(ready)

    def _produce_staged(self, buffers: Buffers, first: Scalar, last: Scalar) -> None:
        t = self.tiles

        def stage(tile: Scalar, which: int) -> None:
            self.fetch(tile, which, buffers.staging.at[which], buffers.staged.at[which])

        @pl.when(first < last)
        def _start() -> None:
            stage(first, 0)
            stage(first, 1)

        @pl.loop(first, last)
        def _tile(tile: Scalar) -> None:
            n = tile - first
            slot = lax.rem(n, t.stages)
            for which, ring in enumerate((buffers.keys, buffers.values)):

                @pl.when(n >= t.stages)
                def _free(which: int = which) -> None:
                    plgpu.barrier_wait(buffers.free.at[which, slot])

                plgpu.barrier_wait(buffers.staged.at[which])
                self._rewrite(tile, buffers.staging.at[which], ring.at[slot])
                plgpu.barrier_arrive(buffers.ready.at[which, slot])

                @pl.when(tile + 1 < last)
                def _next(which: int = which) -> None:
                    stage(tile + 1, which)
