"""The geometry of a unit's pool: rows per page, number of pages, default sequence lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxjax.pallas_kernels.layout import LANES, KVLayout

_ROW_STEP = 16
"""Rows of a tile in a TPU's memory, for bfloat16 (float32: 8); a page is a multiple."""
_MIN_TOKENS = 8
"""Minimum tokens per page: with fewer, tables and page copies cost more than the pages save."""
GPU_TOKEN_GROUP = 8
"""Tokens that a GPU's copy engine moves at once into the tiles of its tensor cores."""
_UNGROUPED_COST = 0.25
"""Cost of a page that is not a multiple of `GPU_TOKEN_GROUP`, as a fraction of the pool: the kernel
must rewrite every tile. An estimate."""
DEFAULT_MAX_MODEL_LEN = 8192
"""Upper limit of the default `max_model_len`."""


@dataclass(frozen=True)
class KVShape:
    """The keys and values of a model, as needed to choose the page size.

    Attributes:
      name: of the model, for messages.
      num_layers, num_kv_heads, head_dim: `L`, `K`, `H`.
      mean_tokens: expected tokens of a request, prompt and output.
    """

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    mean_tokens: float


def choose_page_rows(models: Sequence[KVShape], *, token_group: int = 1) -> int:
    """Returns the rows per page that waste the smallest fraction of the pool.

    The waste of a model has three parts: rows of a page that are too few for a token, on average
    half of each sequence's last block, and longer block tables if a page has few tokens. The cost
    of a page size is the maximum over the models.

    Args:
      models: of the unit.
      token_group: prefers pages that hold a multiple of this many tokens without unused rows:
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
            penalty = 0.0 if grouped else _UNGROUPED_COST
            worst = max(worst, unused + last_block + 1 / tokens + penalty)
        return worst

    widest = max(KVLayout(10**9, m.num_kv_heads, m.head_dim).rows_per_token for m in models)
    smallest = -(-widest * _MIN_TOKENS // _ROW_STEP) * _ROW_STEP
    return min(range(smallest, 8 * smallest + 1, _ROW_STEP), key=cost)


def page_count(memory: int, rows: int, itemsize: int) -> int:
    """Returns the number of pages of `rows` rows that fit into `memory` bytes."""
    return memory // (rows * LANES * itemsize)


def default_max_model_len(
    max_position: int, layout: KVLayout, num_layers: int, num_pages: int, available: float
) -> int:
    """Returns the default `max_model_len` of a model.

    Args:
      max_position: context length of the model.
      layout: geometry of its keys and values.
      num_layers: number of layers, and of pages in a block.
      num_pages: of the pool, without the dummy block.
      available: the fraction of the pool, 0 to 1, that is not guaranteed to other models.

    Returns:
      The minimum of the context length, `DEFAULT_MAX_MODEL_LEN`, and the tokens in half of the
      pool, or in 0.9 of the part available to the model if that is less.
    """
    pages = int(num_pages * min(0.5, 0.9 * available))
    tokens = pages // num_layers * layout.tokens_per_page
    return max(2, min(max_position, DEFAULT_MAX_MODEL_LEN, tokens))
