from __future__ import annotations

import math

import pytest

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.policies.chunk_size import prefill_chunk_tokens
from tests.muxjax.scheduling.harness import spec


def times(part: float, whole: float) -> StepEstimates:
    """Of a model `a` whose prefills of 128 and of 512 tokens take so many seconds."""
    made = StepEstimates("a")
    made.observe_prefill("a", 128, part)
    made.observe_prefill("a", 512, whole)
    return made


@pytest.mark.parametrize(
    ("seconds", "tokens"), [(math.inf, 512), (0.4, 512), (0.39, 128), (0.05, 128), (-1.0, 128)]
)
def test_a_step_is_a_part_where_the_whole_would_last_too_long(seconds: float, tokens: int) -> None:
    assert prefill_chunk_tokens(spec(prefill_tokens=512), times(0.1, 0.4), seconds) == tokens


def test_what_costs_much_whatever_its_size_is_not_cut() -> None:
    assert prefill_chunk_tokens(spec(prefill_tokens=512), times(0.15, 0.4), 0.1) == 128
    assert prefill_chunk_tokens(spec(prefill_tokens=512), times(0.16, 0.4), 0.1) == 512


def test_a_small_size_has_no_part() -> None:
    assert prefill_chunk_tokens(spec(prefill_tokens=16), times(0.1, 0.4), 0.0) == 16
