from __future__ import annotations

import json
from typing import Any

import pytest

from muxjax._version import __version__
from muxjax.errors import PlanError, WorkloadError
from muxjax.placement.simulator.metrics import AttainmentTarget
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_units import System
from muxjax.placement.simulator.simulation import Setup, checked_scales, run, sweep
from muxjax.placement.workload.synthetic import Synthetic, Traffic
from muxjax.placement.workload.trace import TraceRequest, Workload
from tests.placement.simple_costs import SimpleCosts, plan, planned, unit

SETUP = Setup(
    plan(unit(planned("a"), planned("b"))),
    {"toy": SimpleCosts()},
    {name: AttainmentTarget(scale=3.0, kind="small") for name in ("a", "b")},
    seed=5,
    describes={"workload": "test"},
)


def workload(count: int = 40) -> Workload:
    return [TraceRequest(index / 10, "ab"[index % 2], 20, 10) for index in range(count)]


def test_a_run_says_what_it_was() -> None:
    records: list[tuple[RequestRecord, bool]] = []
    seen: list[float] = []
    found = run(
        SETUP,
        System(),
        workload(),
        on_record=lambda record, met: records.append((record, met)),
        progress=seen.append,
    )
    assert found["seed"] == 5
    assert found["version"] == __version__
    assert found["config_hash"] == SETUP.config_hash(System())
    assert (found["policy"], found["execution"]) == ("adbs", "time_sliced")
    assert found["finished"] == len(records) == 40
    assert sum(met for _, met in records) / 40 == found["slo_attainment"]
    assert seen == [0.0]
    (one,) = found["units"]
    assert one["models"] == ["a", "b"]
    assert 0 < one["busy"] <= 1
    assert json.loads(json.dumps(found)) == found


def test_the_hash_follows_what_a_run_depends_on() -> None:
    hashes = {
        SETUP.config_hash(System()),
        SETUP.config_hash(System("fcfs")),
        SETUP.config_hash(System("adbs", "concurrent")),
        Setup(SETUP.plan, SETUP.costs, SETUP.targets, seed=6).config_hash(System()),
    }
    assert len(hashes) == 4
    assert run(SETUP, System(), workload()) == run(SETUP, System(), workload())


@pytest.mark.parametrize("policy", ["spatial", "temporal"])
def test_baselines(policy: Any) -> None:
    found = run(SETUP, System(policy, "concurrent"), workload())
    assert found["finished"] == 40
    assert len(found["units"]) == (2 if policy == "spatial" else 1)
    assert found["execution"] == ("concurrent" if policy == "spatial" else "time_sliced")


def swept(scales: tuple[float, ...]) -> list[dict[str, Any]]:
    def one(system: System, scale: float, scaled: Workload) -> dict[str, Any]:
        return run(SETUP, system, scaled)

    source = Synthetic([Traffic("a", 1.0), Traffic("b", 1.0)], count=60)
    requests = [TraceRequest(r.arrival, r.model, 20, 10) for r in source]
    return sweep(SETUP, [System(), System("fcfs")], requests, scales, one=one)


def test_a_sweep_narrows_down_the_highest_rate() -> None:
    found = swept((0.1, 100.0))
    assert [policy["policy"] for policy in found] == ["adbs", "fcfs"]
    for policy in found:
        assert len(policy["runs"]) == 6
        rates = [result["offered_rate"] for result in policy["runs"]]
        assert rates == sorted(rates)
        passing = [r["offered_rate"] for r in policy["runs"] if r["slo_attainment"] >= 0.99]
        assert policy["max_rate_at_99"] == max(passing)
        assert passing[-1] > rates[0]
        assert {"seed", "config_hash", "version"} <= policy.keys()


def test_a_sweep_that_never_or_always_passes_is_not_narrowed_down() -> None:
    always, never = swept((0.05, 0.1))[0], swept((100.0,))[0]
    assert len(always["runs"]) == 2
    assert always["max_rate_at_99"] == always["runs"][-1]["offered_rate"]
    assert never["max_rate_at_99"] is None


def test_what_makes_no_sense_is_refused() -> None:
    assert checked_scales([2.0, 1.0, 2.0]) == (1.0, 2.0)
    with pytest.raises(WorkloadError, match="rate scale must be above 0"):
        checked_scales([1.0, -1.0])
    with pytest.raises(WorkloadError, match="at least"):
        checked_scales([])
    with pytest.raises(PlanError, match="no unit with a model"):
        run(Setup(plan(), SETUP.costs, {}), System(), workload())
