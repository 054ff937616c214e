from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from _map_cells import POLICIES, TRAINING_SEED, _Model, _Runner
from _map_fleet import CellJob, fleet, workload

from muxjax.errors import PlanError
from muxjax.placement.planner.plan import Execution


def a_job(execution: Execution = "time_sliced", ahead: bool = False) -> CellJob:
    return CellJob(2.1, 0.3, (2.0, 8.0), execution, "h200", 0.3, 0, POLICIES, Path("none"), ahead)


def test_the_most_popular_has_the_highest_rate() -> None:
    loads = fleet(0.7, 0.5)
    assert len(loads) == 19
    assert loads[0].expected.rate == pytest.approx(20.0)
    assert loads[1].expected.rate == pytest.approx(20.0 / 2**0.7)
    assert loads[-1].kind == "llama-65b"


@pytest.mark.usefixtures("three_models")
@pytest.mark.parametrize(("ahead", "seed"), [(True, TRAINING_SEED), (False, 0)])
def test_placements_are_chosen_on_the_requests_that_count_or_ahead_on_others(
    monkeypatch: pytest.MonkeyPatch, ahead: bool, seed: int
) -> None:
    runner = _Runner(a_job(ahead=ahead))
    seen: list[Sequence[Any]] = []
    simulate = runner._simulate

    def note(units: Any, policy: Any, scale: float, requests: Sequence[Any]) -> Any:
        seen.append(requests)
        return simulate(units, policy, scale, requests)

    monkeypatch.setattr(runner, "_simulate", note)
    _, chosen = runner.choose("adbs", 2.0)
    tried = workload(fleet(2.1, 0.3), 0.3, seed)
    assert seen
    assert all(list(requests) == tried for requests in seen)
    seen.clear()
    runner.score(chosen, "adbs", 2.0)
    assert all(list(requests) == workload(fleet(2.1, 0.3), 0.3, 0) for requests in seen)
    assert bool(seen) == ahead  # what is known is not run again


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
    assert set(runs[len(before) :]) == {"slo"}


class Outcomes:
    """What would come of it, by placement and policy: attainment and throughput."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: dict[Any, tuple[float, float]]):
        names = sorted({name for name, _ in found})
        self._runner = _Runner(a_job())
        units = self._runner._placements["spatial"][0][0]
        self._placed = {name: [[units[0].model_copy(update={"name": name})]] for name in names}
        self.tried: list[str] = []

        def run(chosen: Any, policy: str, scale: float, *, counting: bool) -> Any:
            del scale, counting
            name = chosen[0][0].name
            if policy == "slo":
                self.tried.append(name)
            share, served = found[name, "slo" if policy == "slo" else "others"]
            met = {2.0: round(1000 * share)}
            return {"m": _Model(1000, 1000, 1000 / served, met)}

        def candidates(policy: str, scale: float) -> Any:
            del policy, scale
            return self._placed

        monkeypatch.setattr(self._runner, "_run", run)
        monkeypatch.setattr(self._runner, "_candidates", candidates)

    def choice(self) -> str:
        """Where `slo` is placed."""
        return self._runner.choose("slo", 2.0)[0]


@pytest.mark.usefixtures("three_models")
def test_where_slo_falls_short_of_nobody_nothing_more_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {("a", "others"): (0.99, 10.0), ("b", "others"): (0.98, 20.0)}
    outcomes = Outcomes(monkeypatch, {**found, ("a", "slo"): (0.99, 10.0), ("b", "slo"): (1, 20.0)})
    assert outcomes.choice() == "a"
    assert set(outcomes.tried) == {"a"}


@pytest.mark.usefixtures("three_models")
@pytest.mark.parametrize(
    ("a", "b", "best"),
    [
        ((0.85, 10.0), (0.95, 10.0), "b"),  # behind on a
        ((0.95, 9.0), (0.91, 10.0), "b"),  # serves less on a
        ((0.91, 9.8), (0.88, 10.0), "a"),  # short on both: attainment comes first
        ((0.91, 9.8), (0.95, 9.7), "a"),  # behind on neither: serves more on a
        ((0.80, 10.0), (0.85, 9.0), "b"),  # behind on both, less on b
        ((0.892, 10.0), (0.95, 9.8), "a"),  # behind on a by no more than the bars allow
        ((0.895, 10.0), (0.91, 9.97), "b"),  # hardly short on either: attains more
        ((0.95, 10.0), (0.97, 10.0), "b"),  # short on neither, and there is more to win
    ],
)
def test_slo_is_placed_where_it_falls_least_short(
    monkeypatch: pytest.MonkeyPatch, a: tuple[float, float], b: tuple[float, float], best: str
) -> None:
    found = {("a", "others"): (0.9, 10.0), ("b", "others"): (0.8, 10.0)}
    outcomes = Outcomes(monkeypatch, {**found, ("a", "slo"): a, ("b", "slo"): b})
    assert outcomes.choice() == best


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
