"""How the Mosaic GPU kernels cut one model's work: shapes of tiles, and what they take of a block.

No JAX tracing here: everything is a Python number, known when a kernel is traced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp

from muxjax.pallas_kernels.gpu.tuned import TUNED
from muxjax.pallas_kernels.layout import LANES, KVLayout

ROWS = 64
"""Rows of scores that a warpgroup computes: the M of a `wgmma`."""
COLUMNS = 64
"""Columns of the output that are sent at a time."""
SHARED_MEMORY = 224 * 1024
"""Bytes that a block's tiles may take on Hopper (H100, H200): of 227 KiB, less what Mosaic reserves
for reductions (2 KiB) and barriers."""
PAIRED_MEMORY = 110 * 1024
"""Bytes that a block's tiles may take if two blocks are to share a multiprocessor (228 KiB)."""
MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM)."""
WIDTHS = (64, 128, 256)
"""Head sizes as the kernels hold them; others are filled up with zeros to the next."""


@dataclass(frozen=True)
class Tiles:
    """The shapes of one kernel.

    Keys and values reach shared memory in tiles of `tokens` tokens of one KV head. Two ways:

    *Direct*: TMA writes the tile in the swizzled form that `wgmma` reads. It needs a 16-bit pool,
    heads as wide as a tile, and pages of whole groups of 8 tokens, since TMA fills swizzled tiles
    by groups of 8 rows.

    *Staged*: TMA writes plain rows, from anywhere in the pool, and the producer turns them into
    swizzled tiles. A float32 pool is always staged: `wgmma` multiplies float32 with 10 bits of
    mantissa only, so each number is split into three bfloat16 parts, whose six largest products
    make up float32's 24 bits.

    Attributes:
      layout: the model's geometry in the pool.
      dtype: the pool's.
      warpgroups: that compute; each has `ROWS` rows. One more moves data.
      tokens: in a tile.
      stages: tiles of keys, and of values, in flight.
      waves: blocks that a multiprocessor should get in decode, one after the other, so that the
        last to end do not keep the others waiting long.
      interpreted: for Pallas's interpreter, which (JAX 0.12) has no `wgmma` with the left operand
        in registers and none that goes on from an accumulator's old value. Both are what a GPU
        does best; this is the only difference between what is interpreted and what is compiled.
    """

    layout: KVLayout
    dtype: jnp.dtype
    warpgroups: int
    tokens: int
    stages: int
    waves: int = 3
    interpreted: bool = False

    @property
    def width(self) -> int:
        """A head's elements in shared memory."""
        return next(w for w in WIDTHS if w >= self.layout.padded_head_dim)

    @property
    def whole_tokens(self) -> bool:
        """Whether a page is a whole number of tokens, so that TMA can step over tokens."""
        return self.layout.rows % self.layout.rows_per_token == 0

    @property
    def direct(self) -> bool:
        return (
            self.dtype.itemsize == 2
            and self.layout.padded_head_dim == self.width
            and self.whole_tokens
            and self.layout.tokens_per_page % 8 == 0
        )

    @property
    def swizzle(self) -> int:
        """Bytes of a row of swizzled memory; a product takes as many tokens at least."""
        return min(128, 2 * self.tokens)

    @property
    def chunk(self) -> int:
        """Tokens that one copy fetches: they lie in one page, and chunks fill a tile."""
        if not self.whole_tokens:
            return 1
        return math.gcd(self.layout.tokens_per_page, self.tokens)

    @property
    def chunks(self) -> int:
        return self.tokens // self.chunk

    @property
    def query_columns(self) -> int:
        """Columns of queries fetched at a time: wide ones wait for each other, to save memory."""
        return self.width if self.parts == 1 and self.width <= 128 else COLUMNS

    @property
    def rewritten_rows(self) -> int:
        """Rows of a tile that the producer rewrites at a time: four swizzled tiles at least."""
        return 32 if self.width == 64 else 16

    @property
    def parts(self) -> int:
        """16-bit numbers that an element is split into."""
        return 1 if self.dtype.itemsize == 2 else 3

    @property
    def part_dtype(self) -> jnp.dtype:
        return self.dtype if self.dtype.itemsize == 2 else jnp.dtype(jnp.bfloat16)

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """Pairs of parts whose products are summed, the small ones first."""
        pairs = [(a, b) for a in range(self.parts) for b in range(self.parts - a)]
        return tuple(sorted(pairs, key=lambda pair: -sum(pair)))

    @property
    def token_width(self) -> int:
        """Elements of a token in the pool."""
        return self.layout.rows_per_token * LANES

    @property
    def page_view(self) -> tuple[int, int]:
        """The shape in which the kernels see a page: its tokens, or else all its rows in one."""
        if self.whole_tokens:
            return (self.layout.tokens_per_page, self.token_width)
        return (1, self.layout.rows * LANES)

    @property
    def shared_memory(self) -> int:
        """Bytes of a block's shared memory, barriers aside."""
        tile = self.tokens * self.width
        stages = 2 * self.stages * self.parts * tile * 2
        staging = 0 if self.direct else 2 * tile * self.dtype.itemsize
        queries = self.warpgroups * ROWS * self.width * 2 * self.parts
        plain = self.warpgroups * ROWS * (self.query_columns * self.dtype.itemsize + COLUMNS * 4)
        return stages + staging + queries + plain


def choose_tiles(
    layout: KVLayout,
    dtype: jnp.dtype,
    *,
    decode: bool,
    device_kind: str,
    interpreted: bool = False,
) -> Tiles:
    """The tiles for a model: from the tuned table, or else by rules.

    Rules: prefill takes as many tokens as keep the tensor cores' operands from being read too often
    from shared memory. Decode takes as few as let two blocks share a multiprocessor (in shared
    memory, and with at most 128 registers a thread), so that one starts or ends while the other
    keeps the memory busy; heads of 256 leave no room for two. Then as many stages as fit.
    """
    tuned = TUNED.get((device_kind, layout.num_kv_heads, layout.padded_head_dim, decode))
    if tuned is not None and dtype.itemsize == 2:
        tiles = Tiles(layout, dtype, *tuned, interpreted=interpreted)
        # Tuned for pages of whole groups of tokens: others take more memory.
        if tiles.shared_memory <= SHARED_MEMORY:
            return tiles
    width = next(w for w in WIDTHS if w >= layout.padded_head_dim)
    if dtype.itemsize == 4:
        tokens = {64: 64, 128: 32, 256: 16}[width]
        return Tiles(layout, dtype, 1, tokens, 1, interpreted=interpreted)
    if decode:
        tokens, most = {64: 64, 128: 32, 256: 64}[width], 1
        limit = PAIRED_MEMORY if width < 256 else SHARED_MEMORY
    else:
        tokens, most = (128 if width < 256 else 64), 2
        limit = SHARED_MEMORY
    for warpgroups in range(most, 0, -1):
        for stages in (4, 3, 2, 1):
            tiles = Tiles(layout, dtype, warpgroups, tokens, stages, interpreted=interpreted)
            if tiles.shared_memory <= limit:
                return tiles
    raise ValueError(f"no tiles fit shared memory: {layout} in {dtype.name}")


def choose_splits(tiles: Tiles, num_seqs: int, tokens: int) -> int:
    """Blocks that share a sequence's context in decode.

    Enough blocks to keep the multiprocessors busy to the end, each with at least two tiles of the
    longest context there may be.

    Args:
      tiles: shapes.
      num_seqs: `S`.
      tokens: the longest context that block tables have room for.
    """
    wanted = -(-tiles.waves * MULTIPROCESSORS // (num_seqs * tiles.layout.num_kv_heads))
    return max(1, min(wanted, tokens // (2 * tiles.tokens)))
