from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from muxjax.scheduling.routing import PlannedLoad, fastest_unit


@dataclass(frozen=True)
class FakeUnit:
    name: str
    planned_load: PlannedLoad


def unit(name: str, token_seconds: float, outstanding: float = 1.0) -> FakeUnit:
    return FakeUnit(name, PlannedLoad({"a": token_seconds}, outstanding))


def assign(units: list[FakeUnit], outstanding: dict[str, float], count: int) -> Counter[str]:
    """Assigns requests of 10 tokens that do not end; returns the number on each unit."""
    counts: Counter[str] = Counter()
    for _ in range(count):
        chosen = fastest_unit(units, outstanding, "a", 10)
        outstanding[chosen.name] += chosen.planned_load.seconds("a", 10)
        counts[chosen.name] += 1
    return counts


def test_faster_of_two_idle_units_is_chosen() -> None:
    slow, fast = unit("slow", 3.0), unit("fast", 1.0)
    assert fastest_unit([slow, fast], {"slow": 0.0, "fast": 0.0}, "a", 10) is fast


def test_first_of_equal_units_is_chosen() -> None:
    units = [unit("first", 1.0), unit("second", 1.0)]
    assert fastest_unit(units, {"first": 5.0, "second": 5.0}, "a", 10) is units[0]
    assert fastest_unit(units[1:], {"second": 5.0}, "a", 10) is units[1]


def test_units_without_a_plan_get_equal_loads() -> None:
    units = [FakeUnit("first", PlannedLoad()), FakeUnit("second", PlannedLoad())]
    assert assign(units, {"first": 0.0, "second": 0.0}, 10) == {"first": 5, "second": 5}


def test_faster_unit_is_preferred_up_to_its_planned_load() -> None:
    units = [unit("slow", 2.0, 1_000.0), unit("fast", 1.0, 100.0)]
    outstanding = {"slow": 0.0, "fast": 0.0}
    assert assign(units, outstanding, 10) == {"fast": 10}
    # At twice its planned load the fast unit is as slow as the other one.
    counts = assign(units, outstanding, 30)
    assert 8 <= counts["fast"] <= 11


def test_units_of_equal_speed_are_loaded_as_planned() -> None:
    units = [unit("small", 1.0, 100.0), unit("large", 1.0, 300.0)]
    outstanding = {"small": 0.0, "large": 0.0}
    counts = assign(units, outstanding, 120)
    assert 25 <= counts["small"] <= 35


def test_load_of_other_models_counts() -> None:
    units = [unit("busy", 1.0, 100.0), unit("free", 1.0, 100.0)]
    assert fastest_unit(units, {"busy": 150.0, "free": 0.0}, "a", 10) is units[1]
