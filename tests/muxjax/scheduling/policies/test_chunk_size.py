from __future__ import annotations

import math

import pytest

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.policies.chunk_size import prefill_chunk_tokens
from tests.muxjax.scheduling.harness import spec


def prefill_times(chunk: float, largest: float) -> StepEstimates:
    """Estimates of a model `a`: seconds of prefills of 128 and of 512 tokens."""
    estimates = StepEstimates("a")
    estimates.observe_prefill("a", 128, chunk)
    estimates.observe_prefill("a", 512, largest)
    return estimates


@pytest.mark.parametrize(
    ("seconds", "tokens"), [(math.inf, 512), (0.4, 512), (0.39, 128), (0.05, 128), (-1.0, 128)]
)
def test_prefill_is_chunked_if_it_would_last_too_long(seconds: float, tokens: int) -> None:
    assert (
        prefill_chunk_tokens(spec(prefill_tokens=512), prefill_times(0.1, 0.4), seconds) == tokens
    )


def test_prefill_with_high_fixed_cost_is_not_chunked() -> None:
    assert prefill_chunk_tokens(spec(prefill_tokens=512), prefill_times(0.15, 0.4), 0.1) == 128
    assert prefill_chunk_tokens(spec(prefill_tokens=512), prefill_times(0.16, 0.4), 0.1) == 512


def test_small_prefill_is_not_chunked() -> None:
    assert prefill_chunk_tokens(spec(prefill_tokens=16), prefill_times(0.1, 0.4), 0.0) == 16
