"""The arrays that the host sends with a step.

A prefill's rows are packed into one int32 array, which is one transfer; floats are sent as their
bits. `Column` names its columns, and the block table follows them. Inputs that few requests need
are separate arrays, with defaults kept on the device (`model_slots.DefaultInputs`): masks of
allowed tokens (one bit each, `W` words per row), logit biases, and the prompt tokens whose
log-probabilities are needed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from muxjax.executor.sampler import SamplingArrays
from muxjax.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from muxjax.scheduling.steps import PrefillChunk

_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class Column(enum.IntEnum):
    """Columns of a prefill's row before its block table."""

    SLOT = 0
    LENGTH = 1
    START = 2
    PROMPT = 3
    LAST = 4
    REMAINING = 5
    TOP_K = 6
    LOGPROBS = 7
    MIN_TOKENS = 8
    FIRST = 9
    SEED = 10  # 2 columns
    FLOATS = 12
    STOP_IDS = 12 + len(_FLOATS)
    BLOCKS = 12 + len(_FLOATS) + MAX_STOP_TOKEN_IDS


@struct.dataclass
class PrefillRows:
    """A prefill's rows, unpacked on the device."""

    slot: Int[Array, " S"]
    length: Int[Array, " S"]
    start: Int[Array, " S"]
    num_prompt: Int[Array, " S"]
    first: Bool[Array, " S"]
    last: Bool[Array, " S"]
    remaining: Int[Array, " S"]
    stop_ids: Int[Array, "S 8"]
    settings: SamplingArrays
    block_tables: Int[Array, "S B"]


def seed_words(seed: int | None) -> tuple[int, int]:
    """Returns a seed as two words, the high one first; a request without a seed must be greedy."""
    bits = (seed or 0) % 2**64
    return bits >> 32, bits & 0xFFFFFFFF


def pack_chunk(row: np.ndarray, chunk: PrefillChunk) -> None:
    """Fills the columns of one prefill row, except the block table.

    Args:
      row: int32, at least `Column.BLOCKS` wide; changed in place.
      chunk: the chunk to pack.
    """
    row[Column.SLOT] = chunk.slot
    row[Column.LENGTH] = len(chunk.tokens)
    row[Column.START] = chunk.start
    row[Column.PROMPT] = chunk.num_prompt_tokens
    row[Column.FIRST] = chunk.first
    row[Column.LAST] = chunk.last
    params = chunk.sampling
    if params is None:
        return
    row[Column.REMAINING] = chunk.remaining_tokens
    row[Column.TOP_K] = params.top_k
    row[Column.LOGPROBS] = -1 if params.logprobs is None else params.logprobs
    row[Column.MIN_TOKENS] = min(params.min_tokens, 2**30)  # a position is added: no overflow
    words = np.array(seed_words(params.seed), np.uint32)
    row[Column.SEED : Column.FLOATS] = words.view(np.int32)
    floats = np.array([getattr(params, name) for name in _FLOATS], np.float32)
    row[Column.FLOATS : Column.STOP_IDS] = floats.view(np.int32)
    row[Column.STOP_IDS : Column.BLOCKS] = _stop_row(chunk.stop_ids)


def mask_words(vocab_size: int) -> int:
    """Returns `W`, the number of words of a mask over a vocabulary."""
    return -(-vocab_size // 32)


def pack_bias(row: np.ndarray, bias: Mapping[int, float]) -> None:
    """Fills a row of biases `[2, 300]` in place: ids (-1 for padding), then the values' bits."""
    row[0] = -1
    row[0, : len(bias)] = list(bias)
    row[1, : len(bias)] = np.array(list(bias.values()), np.float32).view(np.int32)


def unpack_bias(
    bias: Int[Array, "S 2 300"],
) -> tuple[Int[Array, "S 300"], Float[Array, "S 300"]]:
    """Unpacks the rows of `pack_bias` on the device into ids and values."""
    return bias[:, 0], lax.bitcast_convert_type(bias[:, 1], jnp.float32)


def empty_bias(rows: int) -> np.ndarray:
    """Returns `rows` rows of `pack_bias` without any bias."""
    packed = np.zeros((rows, 2, MAX_LOGIT_BIAS), np.int32)
    packed[:, 0] = -1
    return packed


def _stop_row(stop_ids: Sequence[int]) -> np.ndarray:
    row = np.full(MAX_STOP_TOKEN_IDS, -1, np.int32)
    row[: len(stop_ids)] = stop_ids
    return row


def unpack_prefill(rows: Int[Array, "S columns"]) -> PrefillRows:
    """Unpacks the rows of `pack_chunk` and their block tables on the device."""
    floats = lax.bitcast_convert_type(rows[:, Column.FLOATS : Column.STOP_IDS], jnp.float32)
    settings = SamplingArrays(
        **{name: floats[:, i] for i, name in enumerate(_FLOATS)},
        top_k=rows[:, Column.TOP_K],
        seed=lax.bitcast_convert_type(rows[:, Column.SEED : Column.FLOATS], jnp.uint32),
        logprobs=rows[:, Column.LOGPROBS],
        stop_from=rows[:, Column.PROMPT] + rows[:, Column.MIN_TOKENS],
    )
    return PrefillRows(
        slot=rows[:, Column.SLOT],
        length=rows[:, Column.LENGTH],
        start=rows[:, Column.START],
        num_prompt=rows[:, Column.PROMPT],
        first=rows[:, Column.FIRST] != 0,
        last=rows[:, Column.LAST] != 0,
        remaining=rows[:, Column.REMAINING],
        stop_ids=rows[:, Column.STOP_IDS : Column.BLOCKS],
        settings=settings,
        block_tables=rows[:, Column.BLOCKS :],
    )
