import jax
import numpy as np

from muxjax.executor.step_inputs import Column, pack_chunk, seed_words, unpack_prefill
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.steps import PrefillChunk


def test_packed_rows_are_unpacked_unchanged():
    params = SamplingParams(
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.3,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        seed=2**63 + 12345,
        logprobs=4,
    )
    rows = np.zeros((2, Column.BLOCKS + 3), np.int32)
    first = PrefillChunk(1, 3, (7, 8, 9), 4, 5, [30, 60], 1)
    last = PrefillChunk(2, 0, (5,), 9, 8, [90], 1, params, max_new_tokens=6, stop_ids=(2, 11))
    pack_chunk(rows[0], first)
    pack_chunk(rows[1], last)
    rows[:, Column.BLOCKS :] = [[30, 0, 0], [90, 1, 2]]
    unpacked = jax.jit(unpack_prefill)(rows)
    assert unpacked.slot.tolist() == [3, 0]
    assert unpacked.length.tolist() == [3, 1]
    assert unpacked.start.tolist() == [4, 9]
    assert unpacked.num_prompt.tolist() == [5, 8]
    assert unpacked.last.tolist() == [False, True]
    assert unpacked.remaining[1] == 6 - (10 - 8)
    assert unpacked.stop_ids[1].tolist() == [2, 11, -1, -1, -1, -1, -1, -1]
    assert unpacked.block_tables.tolist() == [[30, 0, 0], [90, 1, 2]]
    settings = jax.tree.map(lambda x: x[1], unpacked.settings)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"):
        assert np.isclose(getattr(settings, name), getattr(params, name))
    assert (settings.top_k, settings.logprobs) == (5, 4)
    assert settings.seed.tolist() == [2**31, 12345]


def test_seed_words_accepts_any_seed():
    assert seed_words(None) == (0, 0)
    assert seed_words(-1) == (2**32 - 1, 2**32 - 1)
    assert seed_words(2**32 + 5) == (1, 5)
