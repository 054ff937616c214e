from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from muxjax.bench.policy_map.cells import POLICIES, TRAINING_SEED, ModelOutcome, PlacementChooser
from muxjax.bench.policy_map.scenario import CellJob, fleet, workload
from muxjax.errors import PlanError
from muxjax.placement.planner.plan import Execution


def a_job(execution: Execution = "time_sliced", ahead: bool = False) -> CellJob:
    return CellJob(2.1, 0.3, (2.0, 8.0), execution, "h200", 0.3, 0, POLICIES, Path("none"), ahead)


def test_the_most_popular_model_has_the_highest_rate() -> None:
    loads = fleet(0.7, 0.5)
    assert len(loads) == 19
    assert loads[0].expected.rate == pytest.approx(20.0)
    assert loads[1].expected.rate == pytest.approx(20.0 / 2**0.7)
    assert loads[-1].kind == "llama-65b"


@pytest.mark.usefixtures("three_models")
@pytest.mark.parametrize(("ahead", "seed"), [(True, TRAINING_SEED), (False, 0)])
def test_placements_are_chosen_on_scored_or_training_requests(
    monkeypatch: pytest.MonkeyPatch, ahead: bool, seed: int
) -> None:
    chooser = PlacementChooser(a_job(ahead=ahead))
    seen: list[Sequence[Any]] = []
    simulate = chooser.simulate

    def recording_simulate(units: Any, policy: Any, scale: float, requests: Sequence[Any]) -> Any:
        seen.append(requests)
        return simulate(units, policy, scale, requests)

    monkeypatch.setattr(chooser, "simulate", recording_simulate)
    _, chosen = chooser.choose("adbs", 2.0)
    tried = workload(fleet(2.1, 0.3), 0.3, seed)
    assert seen
    assert all(list(requests) == tried for requests in seen)
    seen.clear()
    chooser.score(chosen, "adbs", 2.0)
    assert all(list(requests) == workload(fleet(2.1, 0.3), 0.3, 0) for requests in seen)
    assert bool(seen) == ahead  # known outcomes are not simulated again


@pytest.mark.usefixtures("three_models")
def test_only_slo_is_simulated_for_each_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = PlacementChooser(a_job())
    runs: list[str] = []
    simulate = chooser.simulate

    def recording_simulate(units: Any, policy: Any, scale: float, requests: Sequence[Any]) -> Any:
        runs.append(policy)
        return simulate(units, policy, scale, requests)

    monkeypatch.setattr(chooser, "simulate", recording_simulate)
    chooser.choose("fcfs", 2.0)
    chooser.choose("slo", 2.0)
    before = list(runs)
    chooser.choose("fcfs", 8.0)
    chooser.choose("slo", 8.0)
    assert set(before) >= {"fcfs", "adbs", "slo"}
    assert set(runs[len(before) :]) == {"slo"}


class Outcomes:
    """A chooser with prescribed attainment and throughput by placement and policy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, results: dict[Any, tuple[float, float]]):
        names = sorted({name for name, _ in results})
        self._chooser = PlacementChooser(a_job())
        units = self._chooser.placements["spatial"][0][0]
        self._placed = {name: [[units[0].model_copy(update={"name": name})]] for name in names}
        self.tried: list[str] = []

        def run(chosen: Any, policy: str, scale: float, *, scored: bool) -> Any:
            del scale, scored
            name = chosen[0][0].name
            if policy == "slo":
                self.tried.append(name)
            share, served = results[name, "slo" if policy == "slo" else "others"]
            met = {2.0: round(1000 * share)}
            return {"m": ModelOutcome(1000, 1000, 1000 / served, met)}

        def candidates(policy: str, scale: float) -> Any:
            del policy, scale
            return self._placed

        monkeypatch.setattr(self._chooser, "run", run)
        monkeypatch.setattr(self._chooser, "candidates", candidates)

    def choice(self) -> str:
        """The name of the placement of `slo`."""
        return self._chooser.choose("slo", 2.0)[0]


@pytest.mark.usefixtures("three_models")
def test_other_placements_are_not_tried_without_a_shortfall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    baselines = {("a", "others"): (0.99, 10.0), ("b", "others"): (0.98, 20.0)}
    outcomes = Outcomes(
        monkeypatch, {**baselines, ("a", "slo"): (0.99, 10.0), ("b", "slo"): (1, 20.0)}
    )
    assert outcomes.choice() == "a"
    assert set(outcomes.tried) == {"a"}


@pytest.mark.usefixtures("three_models")
@pytest.mark.parametrize(
    ("a", "b", "best"),
    [
        ((0.85, 10.0), (0.95, 10.0), "b"),  # attains less than a baseline on a
        ((0.95, 9.0), (0.91, 10.0), "b"),  # serves less than adbs on a
        ((0.91, 9.8), (0.88, 10.0), "a"),  # short on both: attainment has priority
        ((0.91, 9.8), (0.95, 9.7), "a"),  # attains enough on both, serves more on a
        ((0.80, 10.0), (0.85, 9.0), "b"),  # attains less on both, smaller shortfall on b
        ((0.892, 10.0), (0.95, 9.8), "a"),  # the shortfall on a is within the criteria
        ((0.895, 10.0), (0.91, 9.97), "b"),  # accepted shortfall on both: attains more on b
        ((0.95, 10.0), (0.97, 10.0), "b"),  # no shortfall on either, attains more on b
    ],
)
def test_slo_uses_the_placement_with_the_smallest_shortfall(
    monkeypatch: pytest.MonkeyPatch, a: tuple[float, float], b: tuple[float, float], best: str
) -> None:
    baselines = {("a", "others"): (0.9, 10.0), ("b", "others"): (0.8, 10.0)}
    outcomes = Outcomes(monkeypatch, {**baselines, ("a", "slo"): a, ("b", "slo"): b})
    assert outcomes.choice() == best


@pytest.mark.usefixtures("three_models")
def test_placements_too_small_for_a_request_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = PlacementChooser(a_job())
    simulate = chooser.simulate
    too_small = {model.name for model in chooser.placements["throughput"][0][0][0].models}
    assert len(too_small) > 1  # so that the unit is in no other placement

    def refuse(units: Any, policy: Any, scale: float, requests: Sequence[Any]) -> Any:
        if {model.name for model in units[0].models} == too_small:
            raise PlanError("pool too small")
        return simulate(units, policy, scale, requests)

    monkeypatch.setattr(chooser, "simulate", refuse)
    assert "throughput" not in chooser.candidates("adbs", 2.0)
    monkeypatch.setattr(chooser, "placements", {"throughput": chooser.placements["throughput"]})
    with pytest.raises(PlanError, match="pool too small"):
        chooser.choose("slo", 2.0)


@pytest.mark.usefixtures("three_models")
@pytest.mark.parametrize("policy", ["static", "adbs"])
def test_concurrent_policies_serve_all_requests(policy: Any) -> None:
    chooser = PlacementChooser(a_job("concurrent"))
    _, chosen = chooser.choose(policy, 8.0)
    outcome = chooser.score(chosen, policy, 8.0)
    assert sum(model.finished for model in outcome.values()) == len(
        workload(fleet(2.1, 0.3), 0.3, 0)
    )
