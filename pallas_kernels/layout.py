"""How one model's keys and values lie in the pages of the shared pool (design, section 3).

The pool is `kv[pages, rows, 128]`. A token of one layer takes `R` consecutive rows of a page: its
`K` key heads, then its `K` value heads, each padded to `padded_head_dim` so that the two together
fill whole rows. A page holds `rows // R` tokens, whole ones only. Models of other `K` and `H` see
the same pages through their own layout.
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
      head_dim: `H`, the model's own head size; stored heads are padded to `padded_head_dim`.

    Raises:
      ValueError: a page too small for one token.
    """

    rows: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if min(self.rows, self.num_kv_heads, self.head_dim) < 1:
            raise ValueError(f"rows, num_kv_heads and head_dim must be positive: {self}")
        if self.rows_per_token > self.rows:
            raise ValueError(
                f"a token takes {self.rows_per_token} rows and a page has {self.rows}: {self}"
            )

    @property
    def padded_head_dim(self) -> int:
        """The least head size from `head_dim` up at which a token fills whole rows."""
        head_dim = self.head_dim
        while 2 * self.num_kv_heads * head_dim % LANES:
            head_dim += 1
        return head_dim

    @property
    def rows_per_token(self) -> int:
        """`R`: pool rows that one token of one layer takes."""
        return 2 * self.num_kv_heads * self.padded_head_dim // LANES

    @property
    def tokens_per_page(self) -> int:
        return self.rows // self.rows_per_token
