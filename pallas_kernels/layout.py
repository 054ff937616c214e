"""The layout of one model's keys and values in the pages of the shared pool.

The pool is `kv[pages, rows, 128]`. A token of one layer occupies `R` consecutive rows of a page:
its `K` key heads, then its `K` value heads. Heads are padded to `padded_head_dim`, with which a
token fills whole rows. A page holds `rows // R` tokens; rows after the last one are unused. Models
with other `K` and `H` use the same pages with other layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

LANES = 128
"""Elements in a pool row: the lane width of a TPU's vector unit, 512 bytes in float32."""


@dataclass(frozen=True)
class KVLayout:
    """The geometry of one model's tokens in the pool.

    Attributes:
      rows: rows in a page, the same for all models of a unit.
      num_kv_heads: `K`, key/value heads (after tensor parallelism).
      head_dim: `H`, the model's head size; stored heads are padded to `padded_head_dim`.

    Raises:
      ValueError: a number is below 1, or a page is too small for one token.
    """

    rows: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if min(self.rows, self.num_kv_heads, self.head_dim) < 1:
            raise ValueError(f"rows, num_kv_heads and head_dim must be positive: {self}")
        if self.rows_per_token > self.rows:
            raise ValueError(
                f"page too small: a token needs {self.rows_per_token} rows and a page has "
                f"{self.rows}: {self}"
            )

    @property
    def padded_head_dim(self) -> int:
        """The smallest head size of at least `head_dim` with which a token fills whole rows."""
        head_dim = self.head_dim
        while 2 * self.num_kv_heads * head_dim % LANES:
            head_dim += 1
        return head_dim

    @property
    def rows_per_token(self) -> int:
        """`R`: pool rows of a token in one layer."""
        return 2 * self.num_kv_heads * self.padded_head_dim // LANES

    @property
    def tokens_per_page(self) -> int:
        """Whole tokens in a page."""
        return self.rows // self.rows_per_token
