from __future__ import annotations

import dataclasses

import pytest

from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.steps import Decode, DecodeSequence, Prefill, PrefillChunk


def test_end_and_last_of_a_chunk() -> None:
    first = PrefillChunk(1, 0, (5, 6, 7), 0, 5, [2, 4], 1)
    assert first.end == 3
    assert not first.last
    last = PrefillChunk(1, 0, (8, 9), 3, 5, [2, 4], 2, SamplingParams(max_tokens=4), 4, (0,))
    assert last.end == 5
    assert last.last
    assert last.remaining_tokens == 4


def test_remaining_tokens_exclude_tokens_emitted_before_a_preemption() -> None:
    chunk = PrefillChunk(1, 0, tuple(range(8)), 0, 5, [2, 4], 2, SamplingParams(max_tokens=4), 4)
    assert chunk.remaining_tokens == 1


def test_a_prefill_counts_its_tokens() -> None:
    chunks = [PrefillChunk(i, i, (1,) * (i + 1), 0, 9, [2], 1) for i in range(3)]
    assert Prefill("a", chunks).num_tokens == 6


def test_steps_are_frozen() -> None:
    decode = Decode("a", [DecodeSequence(1, 0, [2], 1, 4)], 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        decode.num_tokens = 5  # type: ignore[misc]
