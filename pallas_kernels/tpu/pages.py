"""Copies the pages of a context from the pool to VMEM, one block ahead of the computation.

The TPU kernels iterate over a context in blocks of pages, with two buffers. While one block is
computed, the pages of the next block are copied to the other buffer. A sequence's last block is
followed by the next sequence's first. Each page is one copy of whole tiles. All copies of a block
signal the semaphore of its buffer, and each copy is waited for.

Rows that must not be read may contain any value, including NaN, and 0 x NaN would reach the output.
These are rows past the context, before the window, or after a page's last token, and pages that
were not copied. `zero_rows_outside` sets them to zero before they are used.
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
"""Rows of a bfloat16 tile in VMEM (8 in float32). Copies consist of whole tiles."""


@dataclass(frozen=True)
class PageBlock:
    """The layout of a block of pages in a buffer of `rows` rows.

    Attributes:
      layout: the model's geometry in the pool.
      pages: pages per block.
    """

    layout: KVLayout
    pages: int

    @property
    def used_rows(self) -> int:
        """Rows of a page that hold tokens."""
        return self.layout.tokens_per_page * self.layout.rows_per_token

    @property
    def page_rows(self) -> int:
        """Rows of a page that are copied: `used_rows`, in whole tiles."""
        return min(-(-self.used_rows // TILE) * TILE, self.layout.rows)

    @property
    def rows(self) -> int:
        """Rows of a buffer: the pages' rows, rounded up to a multiple of the lanes."""
        return -(-self.pages * self.page_rows // LANES) * LANES

    @property
    def tokens(self) -> int:
        """Tokens per block."""
        return self.pages * self.layout.tokens_per_page


class PageCopies:
    """The page copies of one kernel instance.

    Args:
      block: layout of a block of pages in a buffer.
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

    def start(self, table: Any, index: Any, lowest: Any, length: Any, buffer: Any) -> None:
        """Starts copying block `index` of a context to a buffer.

        Args:
          table: ref of the first page of each of the context's blocks.
          index: index of the block of pages.
          lowest: the first position that is read.
          length: one past the last position that is read.
          buffer: index of the buffer.
        """

        def start_page(page: jax.Array, carry: None) -> None:
            source = table[0, 0, index * self._block.pages + page] + self._layer
            self._copy(source, page, buffer).start()

        lax.fori_loop(*self._page_range(index, lowest, length), start_page, None)

    def wait(self, index: Any, lowest: Any, length: Any, buffer: Any) -> None:
        """Waits for the copies that `start` started with the same arguments."""

        def wait_for_page(page: jax.Array, carry: None) -> None:
            self._copy(0, page, buffer).wait()  # only the size of the source matters

        lax.fori_loop(*self._page_range(index, lowest, length), wait_for_page, None)

    def advance(
        self,
        table: Any,
        index: Any,
        lowest: Any,
        length: Any,
        next_buffer: Any,
        start_following: Callable[[Any], None],
    ) -> Any:
        """Starts copying the block after block `index` to the other buffer, and waits for `index`.

        Args:
          table: as for `start`.
          index: as for `start`.
          lowest: as for `start`.
          length: as for `start`.
          next_buffer: ref `[1]` of the buffer that holds the block; flipped.
          start_following: starts the first block of the next context, in the given buffer.

        Returns:
          The buffer that holds the block.
        """
        buffer = next_buffer[0]
        last = (length + self._block.tokens - 1) // self._block.tokens - 1

        @pl.when(index < last)
        def _() -> None:
            self.start(table, index + 1, lowest, length, 1 - buffer)

        @pl.when(index == last)
        def _() -> None:
            start_following(1 - buffer)

        self.wait(index, lowest, length, buffer)
        next_buffer[0] = 1 - buffer
        return buffer

    def valid_rows(self, page: int, index: Any, lowest: Any, length: Any) -> tuple[Any, Any]:
        """The rows of a page of the block that may be read: first, and one past the last."""
        tokens, r = self._block.layout.tokens_per_page, self._block.layout.rows_per_token
        first = (index * self._block.pages + page) * tokens
        return (
            jnp.clip(lowest - first, 0, tokens) * r,
            jnp.clip(length - first, 0, tokens) * r,
        )

    def _page_range(self, index: Any, lowest: Any, length: Any) -> tuple[Any, Any]:
        """The pages of the block with positions to be read: first, and one past the last."""
        tokens = self._block.layout.tokens_per_page
        first = index * self._block.pages
        end = (length + tokens - 1) // tokens - first
        return jnp.maximum(lowest // tokens - first, 0), jnp.minimum(end, self._block.pages)

    def _copy(self, source: Any, page: Any, buffer: Any) -> Any:
        rows = self._block.page_rows
        first = pl.multiple_of(page * rows, TILE)
        return pltpu.make_async_copy(
            self._kv.at[source, pl.ds(0, rows)],
            self._buffers.at[buffer, pl.ds(first, rows)],
            self._semaphores.at[buffer],
        )


def zero_rows_outside(x: jax.Array, first: Any, end: Any) -> jax.Array:
    """`x` with zeros in the rows outside `first <= row < end`."""
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where((row >= first) & (row < end), x, 0.0)
