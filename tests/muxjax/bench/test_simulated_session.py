"""Simulations of a bench session."""

from __future__ import annotations

import pytest

from muxjax.bench.session import BenchSession
from muxjax.bench.simulated_session import simulate_session
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.step_times import DecodeTimes, PrefillTimes, StepTimes
from muxjax.placement.workload.trace import TraceRequest

STEPS = StepTimes(
    {16: PrefillTimes(0.01, ((16, 0.0),), 0.0), 128: PrefillTimes(0.08, ((128, 0.0),), 0.0)},
    {8: DecodeTimes(0.0, ((1, 0.002),))},
)


@pytest.fixture
def profile() -> ProfileTable:
    cells = {"1": {"100": {"1": {"16": {"prefill": 10.0, "decoding": 2.0}}}}}
    names = ("llama", "qwen3")
    steps = dict.fromkeys(names, STEPS.to_json())
    return ProfileTable({**dict.fromkeys(names, cells), "_steps": steps})


def test_the_prefix_cache_is_disabled(session: BenchSession, profile: ProfileTable) -> None:
    # Simulated prompts are identical, so the cache would contain all of them.
    assert session.config.pool.prefix_cache
    workload = [TraceRequest(float(second), "llama", 100, 2) for second in range(3)]
    records = simulate_session(session, profile, workload, "adbs")
    # Three steps of 32 tokens, and one of 4.
    assert [record.ttft for record in records] == pytest.approx([0.25] * 3)


def test_slowdown_applies_to_all_steps(session: BenchSession, profile: ProfileTable) -> None:
    workload = [TraceRequest(0.0, "qwen3", 4, 9)]
    (normal,) = simulate_session(session, profile, workload, "adbs")
    (slow,) = simulate_session(session, profile, workload, "adbs", slowdown=1.5)
    assert normal.ttft == pytest.approx(0.01)
    assert normal.latency == pytest.approx(0.01 + 8 * 0.002)
    assert slow.ttft == pytest.approx(1.5 * 0.01)
    assert slow.latency == pytest.approx(1.5 * (0.01 + 8 * 0.002))
