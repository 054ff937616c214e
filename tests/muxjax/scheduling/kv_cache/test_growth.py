from __future__ import annotations

import numpy as np

from muxjax.scheduling.kv_cache.growth import append_blocks, plan_growth
from muxjax.scheduling.slot_table import SlotTable
from tests.muxjax.scheduling.harness import Loop, request, spec


def running_table() -> SlotTable:
    """Two sequences of five prompt tokens and one generated token, in blocks of four tokens."""
    loop = Loop.create([spec("a", 1, 4, prefill_tokens=64, decode_tokens=1)], 1 + 40)
    for number in range(2):
        loop.scheduler.add(request(number, prompt_tokens=5, max_tokens=6))
    loop.turn()
    return loop.scheduler.models["a"].table


def test_the_last_generated_token_is_not_written_yet() -> None:
    table = running_table()
    slots = np.array([0, 1], np.int64)
    # Five tokens are written; three more fill two blocks, a fourth needs another one.
    for num_tokens, needed, short in ((3, 2, []), (4, 3, [0, 1])):
        counts, blocks, missing = plan_growth(table, slots, num_tokens, 4)
        assert counts.tolist() == [num_tokens] * 2
        assert blocks.tolist() == [needed] * 2
        assert missing.tolist() == short


def test_no_tokens_beyond_the_limit_of_a_sequence() -> None:
    counts, _, _ = plan_growth(running_table(), np.array([0], np.int64), 100, 4)
    assert counts.tolist() == [5]


def test_blocks_are_appended_in_order() -> None:
    table = running_table()
    held = [list(table.blocks[slot]) for slot in (0, 1)]
    slots = np.array([1, 0], np.int64)
    append_blocks(table, slots, np.array([1, 1], np.int64), [30, 31])
    append_blocks(table, slots, np.array([2, 1], np.int64), [32, 33, 34])
    assert table.blocks[0] == [*held[0], 31, 34]
    assert table.blocks[1] == [*held[1], 30, 32, 33]
    assert table.num_blocks[:2].tolist() == [len(held[0]) + 2, len(held[1]) + 3]
