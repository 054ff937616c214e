from __future__ import annotations

import pytest

from muxjax.scheduling.requests import Request
from muxjax.scheduling.slot_table import SlotTable


def test_tokens_between_spans_prompt_and_output() -> None:
    request = Request(0, "a", [1, 2, 3])
    request.output = [4, 5]
    assert request.num_tokens == 5
    assert request.tokens_between(0, 5) == (1, 2, 3, 4, 5)
    assert request.tokens_between(1, 2) == (2,)
    assert request.tokens_between(2, 4) == (3, 4)
    assert request.tokens_between(3, 5) == (4, 5)
    assert request.tokens_between(4, 5) == (5,)


def test_expected_tokens_include_tokens_in_flight() -> None:
    request = Request(0, "a", [1, 2, 3], slot=1, blocks=[7], max_new_tokens=9, prefix_tokens=3)
    request.dispatch(3, step=5)
    assert (request.expected_tokens, request.pending, request.last_step) == (1, 1, 5)
    table = SlotTable(2)
    request.bind_row(table)
    assert (table.limit[1], table.prompt[1], table.num_blocks[1]) == (9, 3, 1)
    request.output = [4]
    table.expected[1] += 3
    table.last_step[1] = 6
    assert (request.expected_tokens, request.pending, request.last_step) == (4, 3, 6)
    request.unbind_row()
    assert (request.expected_tokens, request.pending, request.last_step) == (4, 3, 6)
    assert table.limit[1] == table.expected[1]
    with pytest.raises(ValueError, match="no row"):
        request.unbind_row()
