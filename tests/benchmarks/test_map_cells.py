from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from _map_cells import POLICIES, TRAINING_SEED, _Runner
from _map_fleet import Job, fleet, workload

from muxjax.errors import PlanError
from muxjax.placement.plan import Execution


def a_job(execution: Execution = "time_sliced") -> Job:
    return Job(2.1, 0.3, (2.0, 8.0), execution, "h200", 0.3, 0, POLICIES, Path("none"))


def test_the_most_popular_has_the_highest_rate() -> None:
    loads = fleet(0.7, 0.5)
    assert len(loads) == 19
    assert loads[0].rate == pytest.approx(20.0)
    assert loads[1].rate == pytest.approx(20.0 / 2**0.7)
    assert loads[-1].kind == "llama-65b"


@pytest.mark.usefixtures("three_models")
def test_placements_are_chosen_on_other_requests_than_those_that_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = _Runner(a_job())
    seen: list[Sequence[Any]] = []
    simulate = runner._simulate

    def note(units: Any, policy: Any, scale: float, requests: Sequence[Any]) -> Any:
        seen.append(requests)
        return simulate(units, policy, scale, requests)

    monkeypatch.setattr(runner, "_simulate", note)
    _, chosen = runner.choose("adbs", 2.0)
    others = workload(fleet(2.1, 0.3), 0.3, TRAINING_SEED)
    assert seen
    assert all(list(requests) == others for requests in seen)
    seen.clear()
    runner.score(chosen, "adbs", 2.0)
    assert all(list(requests) == workload(fleet(2.1, 0.3), 0.3, 0) for requests in seen)


@pytest.mark.usefixtures("three_models")
def test_only_slo_is_run_for_each_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _Runner(a_job())
    runs: list[str] = []
    simulate = runner._simulate

    def note(units: Any, policy: Any, scale: float, requests: Sequence[Any]) -> Any:
        runs.append(policy)
        return simulate(units, policy, scale, requests)

    monkeypatch.setattr(runner, "_simulate", note)
    runner.choose("fcfs", 2.0)
    runner.choose("slo", 2.0)
    before = list(runs)
    runner.choose("fcfs", 8.0)
    runner.choose("slo", 8.0)
    assert set(before) >= {"fcfs", "adbs", "slo"}
    assert runs[len(before) :] == ["slo"] * before.count("slo")


@pytest.mark.usefixtures("three_models")
def test_placements_that_do_not_hold_a_request_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _Runner(a_job())
    simulate = runner._simulate
    too_small = {model.name for model in runner._placements["throughput"][0][0][0].models}
    assert len(too_small) > 1  # so that no other placement has the unit

    def refuse(units: Any, policy: Any, scale: float, requests: Sequence[Any]) -> Any:
        if {model.name for model in units[0].models} == too_small:
            raise PlanError("pool too small")
        return simulate(units, policy, scale, requests)

    monkeypatch.setattr(runner, "_simulate", refuse)
    assert "throughput" not in runner._candidates("adbs", 2.0)
    monkeypatch.setattr(runner, "_placements", {"throughput": runner._placements["throughput"]})
    with pytest.raises(PlanError, match="pool too small"):
        runner.choose("slo", 2.0)


@pytest.mark.usefixtures("three_models")
@pytest.mark.parametrize("policy", ["static", "adbs"])
def test_concurrent_policies_serve_all_requests(policy: Any) -> None:
    runner = _Runner(a_job("concurrent"))
    _, chosen = runner.choose(policy, 8.0)
    outcome = runner.score(chosen, policy, 8.0)
    assert sum(model.finished for model in outcome.values()) == len(
        workload(fleet(2.1, 0.3), 0.3, 0)
    )
