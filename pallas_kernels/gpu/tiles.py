"""Tile shapes of the Mosaic GPU kernels and their use of shared memory.

All values are Python numbers that are known before a kernel is traced.
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
"""Columns of the output that are copied to device memory at a time."""
SHARED_MEMORY = 224 * 1024
"""Maximum bytes of a block's tiles on Hopper (H100, H200): 227 KiB less Mosaic's reserve for
reductions (2 KiB) and barriers."""
PAIRED_MEMORY = 110 * 1024
"""Maximum bytes of a block's tiles if two blocks share a multiprocessor (228 KiB)."""
MULTIPROCESSORS = 132
"""Multiprocessors of an H100 or H200 (SXM)."""
WIDTHS = (64, 128, 256)
"""Head sizes of the kernels; other heads are padded with zeros to the next size."""


@dataclass(frozen=True)
class Tiles:
    """The shapes of one kernel.

    Keys and values are copied to shared memory in tiles of `tokens` tokens of one KV head, in one
    of two ways:

    *Direct*: TMA writes the tile in the swizzled form that `wgmma` reads. This needs a 16-bit pool,
    heads as wide as a tile, and pages of a multiple of 8 tokens, since TMA fills swizzled tiles in
    groups of 8 rows.

    *Staged*: TMA writes plain rows, from any address of the pool, and the producer rewrites them as
    swizzled tiles. A float32 pool is always staged. Since `wgmma` multiplies float32 with only 10
    bits of mantissa, each element is split into three bfloat16 parts, whose six largest products
    give float32's 24 bits.

    Attributes:
      layout: the model's geometry in the pool.
      dtype: type of the pool.
      warpgroups: computing warpgroups, each with `ROWS` rows. The producer is an additional one.
      tokens: number of tokens in a tile.
      stages: tiles of keys, and of values, in flight.
      waves: consecutive blocks per multiprocessor in decode. More waves reduce the time at the end
        in which multiprocessors are idle.
      interpreted: whether the kernel is for Pallas's interpreter. JAX 0.12's supports neither a
        `wgmma` with its left operand in registers nor one that adds to an accumulator. This is the
        only difference between interpreted and compiled kernels.
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
        """Whether a page is a multiple of tokens, so that TMA can stride over tokens."""
        return self.layout.rows % self.layout.rows_per_token == 0

    @property
    def direct(self) -> bool:
        """Whether TMA writes swizzled tiles directly (see the class)."""
        return (
            self.dtype.itemsize == 2
            and self.layout.padded_head_dim == self.width
            and self.whole_tokens
            and self.layout.tokens_per_page % 8 == 0
        )

    @property
    def swizzle(self) -> int:
        """Bytes of a row of swizzled memory; at most the bytes of `tokens` 16-bit weights."""
        return min(128, 2 * self.tokens)

    @property
    def chunk(self) -> int:
        """Tokens of one copy. Chunks do not cross pages, and fill a tile exactly."""
        if not self.whole_tokens:
            return 1
        return math.gcd(self.layout.tokens_per_page, self.tokens)

    @property
    def chunks(self) -> int:
        """Copies per tile."""
        return self.tokens // self.chunk

    @property
    def query_columns(self) -> int:
        """Columns of queries fetched at a time; wide queries take several copies to save memory."""
        return self.width if self.parts == 1 and self.width <= 128 else COLUMNS

    @property
    def rewritten_rows(self) -> int:
        """Rows of a tile that the producer rewrites at a time: at least four swizzled tiles."""
        return 32 if self.width == 64 else 16

    @property
    def parts(self) -> int:
        """16-bit parts into which an element is split."""
        return 1 if self.dtype.itemsize == 2 else 3

    @property
    def part_dtype(self) -> jnp.dtype:
        """Type of the parts."""
        return self.dtype if self.dtype.itemsize == 2 else jnp.dtype(jnp.bfloat16)

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """Pairs of parts whose products are summed, smallest products first."""
        pairs = [(a, b) for a in range(self.parts) for b in range(self.parts - a)]
        return tuple(sorted(pairs, key=lambda pair: -sum(pair)))

    @property
    def token_width(self) -> int:
        """Elements of a token in the pool."""
        return self.layout.rows_per_token * LANES

    @property
    def page_view(self) -> tuple[int, int]:
        """The kernels' view of a page: a row per token, or one row (see `whole_tokens`)."""
        if self.whole_tokens:
            return (self.layout.tokens_per_page, self.token_width)
        return (1, self.layout.rows * LANES)

    @property
    def shared_memory(self) -> int:
        """Bytes of a block's shared memory, without barriers."""
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
    """Chooses the tiles for a model: from the tuned table, or else by rule.

    Prefill uses tiles of many tokens, to read the tensor cores' operands less often from shared
    memory. Decode uses few tokens, so that two blocks fit a multiprocessor (shared memory, and at
    most 128 registers per thread). One block then uses the memory while the other starts or ends.
    Heads of 256 are too large for two blocks. The number of stages is the largest that fits.

    Args:
      layout: the model's geometry in the pool.
      dtype: type of the pool.
      decode: whether the tiles are for decode.
      device_kind: key of the tuned table.
      interpreted: see `Tiles`.

    Raises:
      ValueError: no tiles fit shared memory.
    """
    tuned = TUNED.get((device_kind, layout.num_kv_heads, layout.padded_head_dim, decode))
    if tuned is not None and dtype.itemsize == 2:
        tiles = Tiles(layout, dtype, *tuned, interpreted=interpreted)
        # Tuned with direct tiles: staged ones need more memory and may not fit.
        if tiles.shared_memory <= SHARED_MEMORY:
            return tiles
    width = next(w for w in WIDTHS if w >= layout.padded_head_dim)
    if dtype.itemsize == 4:
        tokens = {64: 64, 128: 32, 256: 16}[width]
        return Tiles(layout, dtype, 1, tokens, 1, interpreted=interpreted)
    if decode:
        tokens, max_warpgroups = {64: 64, 128: 32, 256: 64}[width], 1
        limit = PAIRED_MEMORY if width < 256 else SHARED_MEMORY
    else:
        tokens, max_warpgroups = (128 if width < 256 else 64), 2
        limit = SHARED_MEMORY
    for warpgroups in range(max_warpgroups, 0, -1):
        for stages in (4, 3, 2, 1):
            tiles = Tiles(layout, dtype, warpgroups, tokens, stages, interpreted=interpreted)
            if tiles.shared_memory <= limit:
                return tiles
    raise ValueError(f"no tiles fit shared memory: {layout} in {dtype.name}")


def choose_splits(tiles: Tiles, num_seqs: int, tokens: int) -> int:
    """Chooses the number of blocks that share a sequence's context in decode.

    Enough blocks to fill the multiprocessors for `tiles.waves` waves, each with at least two tiles
    of the longest possible context.

    Args:
      tiles: shapes.
      num_seqs: `S`.
      tokens: the longest context that the block tables can address.
    """
    blocks = -(-tiles.waves * MULTIPROCESSORS // (num_seqs * tiles.layout.num_kv_heads))
    return max(1, min(blocks, tokens // (2 * tiles.tokens)))
