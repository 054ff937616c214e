from __future__ import annotations

import json
from typing import Any

import pytest

from muxjax._version import __version__
from muxjax.errors import PlanError, WorkloadError
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_units import SystemConfig
from muxjax.placement.simulator.simulation import (
    SimulationSetup,
    run_simulation,
    sweep_rates,
    validate_scales,
)
from muxjax.placement.workload.synthetic import SyntheticWorkload, Traffic
from muxjax.placement.workload.trace import TraceRequest, Workload
from tests.placement.simple_costs import plan
from tests.placement.simulator.harness import SETUP, workload


def test_a_result_identifies_its_inputs() -> None:
    records: list[tuple[RequestRecord, bool]] = []
    arrivals: list[float] = []
    result = run_simulation(
        SETUP,
        SystemConfig(),
        workload(),
        on_record=lambda record, met: records.append((record, met)),
        progress=arrivals.append,
    )
    assert result["seed"] == 5
    assert result["version"] == __version__
    assert result["config_hash"] == SETUP.config_hash(SystemConfig())
    assert (result["policy"], result["execution"]) == ("adbs", "time_sliced")
    assert result["finished"] == len(records) == 40
    assert sum(met for _, met in records) / 40 == result["slo_attainment"]
    assert arrivals == [0.0]
    (unit,) = result["units"]
    assert unit["models"] == ["a", "b"]
    assert 0 < unit["busy"] <= 1
    assert json.loads(json.dumps(result)) == result


def test_the_hash_depends_on_all_inputs() -> None:
    hashes = {
        SETUP.config_hash(SystemConfig()),
        SETUP.config_hash(SystemConfig("fcfs")),
        SETUP.config_hash(SystemConfig("adbs", "concurrent")),
        SimulationSetup(SETUP.plan, SETUP.costs, SETUP.criteria, seed=6).config_hash(
            SystemConfig()
        ),
    }
    assert len(hashes) == 4
    assert run_simulation(SETUP, SystemConfig(), workload()) == run_simulation(
        SETUP, SystemConfig(), workload()
    )


@pytest.mark.parametrize("policy", ["spatial", "temporal"])
def test_baselines_finish_all_requests(policy: Any) -> None:
    result = run_simulation(SETUP, SystemConfig(policy, "concurrent"), workload())
    assert result["finished"] == 40
    assert len(result["units"]) == (2 if policy == "spatial" else 1)
    assert result["execution"] == ("concurrent" if policy == "spatial" else "time_sliced")


def run_sweep(scales: tuple[float, ...]) -> list[dict[str, Any]]:
    def run(system: SystemConfig, scale: float, scaled: Workload) -> dict[str, Any]:
        return run_simulation(SETUP, system, scaled)

    source = SyntheticWorkload([Traffic("a", 1.0), Traffic("b", 1.0)], count=60)
    requests = [TraceRequest(r.arrival, r.model, 20, 10) for r in source]
    return sweep_rates(SETUP, [SystemConfig(), SystemConfig("fcfs")], requests, scales, run=run)


def test_a_sweep_refines_the_highest_rate() -> None:
    policies = run_sweep((0.1, 100.0))
    assert [policy["policy"] for policy in policies] == ["adbs", "fcfs"]
    for policy in policies:
        assert len(policy["runs"]) == 6
        rates = [run["offered_rate"] for run in policy["runs"]]
        assert rates == sorted(rates)
        passing = [r["offered_rate"] for r in policy["runs"] if r["slo_attainment"] >= 0.99]
        assert policy["max_rate_at_99"] == max(passing)
        assert passing[-1] > rates[0]
        assert {"seed", "config_hash", "version"} <= policy.keys()


def test_a_sweep_without_both_outcomes_is_not_refined() -> None:
    always, never = run_sweep((0.05, 0.1))[0], run_sweep((100.0,))[0]
    assert len(always["runs"]) == 2
    assert always["max_rate_at_99"] == always["runs"][-1]["offered_rate"]
    assert never["max_rate_at_99"] is None


def test_invalid_scales_and_an_empty_plan_raise() -> None:
    assert validate_scales([2.0, 1.0, 2.0]) == (1.0, 2.0)
    with pytest.raises(WorkloadError, match="rate scale must be above 0"):
        validate_scales([1.0, -1.0])
    with pytest.raises(WorkloadError, match="at least"):
        validate_scales([])
    with pytest.raises(PlanError, match="no unit with a model"):
        run_simulation(SimulationSetup(plan(), SETUP.costs, {}), SystemConfig(), workload())
