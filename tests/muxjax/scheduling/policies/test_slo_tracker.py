"""Latency targets, and the urgency of prompts and tokens."""

from __future__ import annotations

import pytest

from muxjax.scheduling.policies.slo_tracker import SloTracker
from muxjax.scheduling.specs import LatencySlo
from tests.muxjax.scheduling.harness import Loop, request, spec


def tracker(slo: LatencySlo) -> tuple[Loop, SloTracker]:
    loop = Loop.create([spec("a", 1, 16, 64, targets=slo)], 400, "slo")
    return loop, SloTracker(loop.scheduler.models["a"], loop.scheduler.estimates)


def test_explicit_targets_are_used_unchanged() -> None:
    _, slo = tracker(LatencySlo(ttft=0.5, tpot=0.02))
    assert slo.ttft(10) == slo.ttft(1000) == 0.5
    assert slo.tpot() == 0.02
    assert slo.has_token_target


def test_other_targets_are_multiples_of_isolated_latencies() -> None:
    targets = LatencySlo(scale=4.0, isolated_ttft=0.1, isolated_tpot=0.01)
    _, slo = tracker(targets)
    tokens = round(slo.mean_prompt())
    assert slo.isolated_ttft(tokens) == pytest.approx(0.1, rel=0.01)
    assert slo.ttft(tokens) == pytest.approx(4 * slo.isolated_ttft(tokens))
    assert slo.ttft(2 * tokens) == pytest.approx(2 * slo.ttft(tokens))
    assert slo.tpot() == pytest.approx(0.04)
    assert slo.allowed_latency() == pytest.approx(slo.ttft(tokens) + 0.04 * slo.mean_output())


def test_an_earlier_request_has_to_start_earlier() -> None:
    _, slo = tracker(LatencySlo(ttft=1.0))
    early, late = request(0), request(1)
    early.arrival, late.arrival = 0.0, 5.0
    assert slo.latest_start(late) - slo.latest_start(early) == pytest.approx(5.0)
    assert slo.latest_starts([early, late]) == [slo.latest_start(early), slo.latest_start(late)]


def test_observed_lengths_replace_the_expected_ones() -> None:
    loop, slo = tracker(LatencySlo(scale=8.0))
    expected = slo.mean_output()
    state = loop.scheduler.models["a"]
    state.finished, state.output_tokens = 10_000, 10_000 * 3
    assert slo.mean_output() == pytest.approx(3.0, rel=0.2)
    assert slo.mean_output() != pytest.approx(expected)
