"""Copying the pages of a context from the pool to VMEM, a block ahead of what is computed.

The TPU kernels walk a context in blocks of pages. Two buffers take turns: while one block is
computed, the pages of the next (of the next sequence, after a sequence's last) are on their way.
Every page is one copy of whole tiles; all copies of a block signal the buffer's one semaphore, and
each is waited for.

Rows that must not be read (beyond the context, before the window, after a page's last whole token,
and pages that were not copied at all) hold anything, NaN included, and 0 x NaN would reach the
output: `keep_rows` makes them zero before they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from muxjax.pallas_kernels.layout import LANES, KVLayout

TILE = 16
"""Rows of a tile of bfloat16 in VMEM (8 in float32). Copies are of whole tiles."""


@dataclass(frozen=True)
class PageBlock:
    """How a block of pages lies in a buffer of `rows` rows.

    Attributes:
      layout: of the model in the pool.
      pages: pages of a block.
    """

    layout: KVLayout
    pages: int

    @property
    def used(self) -> int:
        """Rows of a page that hold tokens."""
        return self.layout.tokens_per_page * self.layout.rows_per_token

    @property
    def page_rows(self) -> int:
        """Rows of a page that are copied: those that hold tokens, in whole tiles."""
        return min(-(-self.used // TILE) * TILE, self.layout.rows)

    @property
    def rows(self) -> int:
        """Rows of a buffer: the pages', and as many more as make whole vectors of lanes."""
        return -(-self.pages * self.page_rows // LANES) * LANES

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.pages * self.layout.tokens_per_page


class Copies:
    """The page copies of one kernel instance.

    Args:
      block: how pages lie in a buffer.
      kv: the pool in HBM, `[P, rows, 128]`.
      buffers: `[2, block.rows, 128]` in VMEM.
      semaphores: one for each buffer.
      layer: added to a block's first page.
    """

    def __init__(
        self, block: PageBlock, kv: Any, buffers: Any, semaphores: Any, layer: jax.Array
    ) -> None:
        self._block = block
        self._kv = kv
        self._buffers = buffers
        self._semaphores = semaphores
        self._layer = layer

    def start(self, table: Any, index: Any, lowest: Any, length: Any, turn: Any) -> None:
        """Starts copying block `index` of a context to buffer `turn`.

        Args:
          table: ref of the first page of each of the context's blocks.
          index: which block of pages.
          lowest: the first position that will be read,
          length: and one past the last.
          turn: which buffer.
        """

        def page(at: jax.Array, carry: None) -> None:
            self._copy(table[0, 0, index * self._block.pages + at] + self._layer, at, turn).start()

        lax.fori_loop(*self._pages(index, lowest, length), page, None)

    def wait(self, index: Any, lowest: Any, length: Any, turn: Any) -> None:
        """Waits for what `start` began."""

        def page(at: jax.Array, carry: None) -> None:
            self._copy(0, at, turn).wait()  # only the size matters

        lax.fori_loop(*self._pages(index, lowest, length), page, None)

    def take(
        self,
        table: Any,
        index: Any,
        lowest: Any,
        length: Any,
        turn: Any,
        start_following: Callable[[Any], None],
    ) -> Any:
        """Waits for block `index`, with the block after it on its way to the other buffer.

        Args:
          table: as for `start`.
          index: likewise.
          lowest: likewise.
          length: likewise.
          turn: ref `[1]` of the buffer that the block is in; flipped.
          start_following: starts the first block of what comes after this context.

        Returns:
          The buffer that the block is in.
        """
        at = turn[0]
        last = (length + self._block.tokens - 1) // self._block.tokens - 1

        @pl.when(index < last)
        def _() -> None:
            self.start(table, index + 1, lowest, length, 1 - at)

        @pl.when(index == last)
        def _() -> None:
            start_following(1 - at)

        self.wait(index, lowest, length, at)
        turn[0] = 1 - at
        return at

    def valid_rows(self, page: int, index: Any, lowest: Any, length: Any) -> tuple[Any, Any]:
        """The rows of a page of the block, from and to, that may be read."""
        tokens, r = self._block.layout.tokens_per_page, self._block.layout.rows_per_token
        first = (index * self._block.pages + page) * tokens
        return (
            jnp.clip(lowest - first, 0, tokens) * r,
            jnp.clip(length - first, 0, tokens) * r,
        )

    def _pages(self, index: Any, lowest: Any, length: Any) -> tuple[Any, Any]:
        tokens = self._block.layout.tokens_per_page
        first = index * self._block.pages
        end = (length + tokens - 1) // tokens - first
        return jnp.maximum(lowest // tokens - first, 0), jnp.minimum(end, self._block.pages)

    def _copy(self, page: Any, at: Any, turn: Any) -> Any:
        rows = self._block.page_rows
        to = pl.multiple_of(at * rows, TILE)
        return pltpu.make_async_copy(
            self._kv.at[page, pl.ds(0, rows)],
            self._buffers.at[turn, pl.ds(to, rows)],
            self._semaphores.at[turn],
        )


def keep_rows(x: jax.Array, first: Any, end: Any) -> jax.Array:
    """`x` with zeros in the rows outside `first <= row < end`."""
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where((row >= first) & (row < end), x, 0.0)
