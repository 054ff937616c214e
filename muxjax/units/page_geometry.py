"""How a unit's pool is cut: rows in a page, pages in all, the longest sequence of each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxjax.pallas_kernels.layout import LANES, KVLayout

_ROW_STEP = 16
"""Pages are whole tiles of a TPU's memory: 16 rows of 128 in bfloat16 (8 in float32)."""
_FEWEST_TOKENS = 8
"""A page with fewer tokens costs more in tables and page copies than a coarser one wastes."""
GPU_TOKEN_GROUP = 8
"""Tokens that a GPU's copy engine moves as one piece into the tiles that its tensor cores read."""
_UNGROUPED = 0.25
"""What a page that is no whole number of such groups costs a model, beside the waste of memory: the
kernel then rewrites every tile (docs/kernels-gpu.md). An estimate: no GPU was at hand."""
DEFAULT_LONGEST = 8192
"""`max_model_len` where neither the fleet file nor the model's own context length is shorter."""


@dataclass(frozen=True)
class KVShape:
    """What the pool needs to know of a model.

    Attributes:
      name: for messages.
      num_layers, num_kv_heads, head_dim: `L`, `K`, `H`.
      mean_tokens: tokens of a request, prompt and output, as expected.
    """

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    mean_tokens: float


def choose_page_rows(models: Sequence[KVShape], *, token_group: int = 1) -> int:
    """Rows in a page: what wastes least of the pool, over all models.

    Each model wastes the rows of a page that no whole token fits in, and half a page of every
    sequence's last block; and a page of few tokens makes long tables. A size is judged by its worst
    model, so that none pays for another's convenience.

    Args:
      models: of the unit.
      token_group: pages of whole groups of so many tokens, and no rows left over, are preferred:
        `GPU_TOKEN_GROUP` on a GPU.
    """

    def cost(rows: int) -> float:
        worst = 0.0
        for model in models:
            layout = KVLayout(rows, model.num_kv_heads, model.head_dim)
            tokens = layout.tokens_per_page
            unused = 1 - tokens * layout.rows_per_token / rows
            last_block = tokens / 2 / max(model.mean_tokens, 1.0)
            grouped = token_group == 1 or not (unused or tokens % token_group)
            penalty = 0.0 if grouped else _UNGROUPED
            worst = max(worst, unused + last_block + 1 / tokens + penalty)
        return worst

    widest = max(KVLayout(10**9, m.num_kv_heads, m.head_dim).rows_per_token for m in models)
    least = -(-widest * _FEWEST_TOKENS // _ROW_STEP) * _ROW_STEP
    return min(range(least, 8 * least + 1, _ROW_STEP), key=cost)


def pages_in(memory: int, rows: int, itemsize: int) -> int:
    """Pages that fit into some bytes."""
    return memory // (rows * LANES * itemsize)


def longest_sequence(
    max_position: int, layout: KVLayout, num_layers: int, num_pages: int, available: float
) -> int:
    """`max_model_len` of a model for which the fleet file gives none.

    Args:
      max_position: the model's context length.
      layout: its geometry.
      num_layers: its depth: pages in a block.
      num_pages: of the pool, without the dummy block.
      available: the part of the pool, 0 to 1, that is not guaranteed to other models.

    Returns:
      The shortest of the model's own length, `DEFAULT_LONGEST`, and what half of the pool can hold
      (or nearly all that is available to it, if that is less).
    """
    pages = int(num_pages * min(0.5, 0.9 * available))
    holds = pages // num_layers * layout.tokens_per_page
    return max(2, min(max_position, DEFAULT_LONGEST, holds))
