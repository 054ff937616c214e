from __future__ import annotations

from dataclasses import dataclass

import pytest

from muxjax.scheduling.routing import MEMORY_SECONDS, RequestRouting


@dataclass(frozen=True)
class FakeUnit:
    name: str
    interval: float = 1.0

    def request_interval(self, model: str) -> float:
        return self.interval


SMALL, LARGE = FakeUnit("small", 1.0), FakeUnit("large", 1 / 3)


def test_idle_unit_with_the_highest_planned_rate_is_chosen() -> None:
    assert RequestRouting().choose([SMALL, LARGE], "a", 10, 0.0) is LARGE


def test_first_of_equal_units_is_chosen() -> None:
    other = FakeUnit("other")
    assert RequestRouting().choose([SMALL, other], "a", 10, 0.0) is SMALL
    assert RequestRouting().choose([other], "a", 10, 0.0) is other


@pytest.mark.parametrize("outstanding", [True, False], ids=["outstanding", "ended"])
def test_requests_are_divided_as_planned(outstanding: bool) -> None:
    routing = RequestRouting()
    counts = {"small": 0, "large": 0}
    for number in range(400):
        unit = routing.choose([SMALL, LARGE], "a", 10, 0.01 * number)
        routing.add(unit.name, "a", 10, 0.01 * number)
        counts[unit.name] += 1
        if not outstanding:
            routing.remove(unit.name, "a", 10)
    assert counts["large"] == pytest.approx(300, abs=3)


def test_unit_that_is_slower_than_planned_gets_fewer_requests() -> None:
    routing = RequestRouting()
    units = [FakeUnit("slow"), FakeUnit("fast")]
    counts = {"slow": 0, "fast": 0}
    for number in range(400):
        unit = routing.choose(units, "a", 10, float(number))
        routing.add(unit.name, "a", 10, float(number))
        counts[unit.name] += 1
        if unit.name == "fast":  # the requests of the other unit never end
            routing.remove("fast", "a", 10)
    assert counts["fast"] > 10 * counts["slow"] > 0


def test_other_models_of_a_unit_do_not_count() -> None:
    routing = RequestRouting()
    routing.add("small", "b", 1_000, 0.0)
    assert routing.choose([SMALL, FakeUnit("other")], "a", 10, 0.0) is SMALL


def test_ended_requests_are_forgotten() -> None:
    routing = RequestRouting()
    other = FakeUnit("other")
    routing.add("small", "a", 50, 0.0)
    routing.remove("small", "a", 50)
    assert routing.choose([SMALL, other], "a", 10, 1.0) is other
    later = 10 * MEMORY_SECONDS
    routing.add("other", "a", 1, later)
    routing.remove("other", "a", 1)
    assert routing.choose([SMALL, other], "a", 10, later) is SMALL
    assert set(routing.outstanding().values()) == {0.0}


def test_clock_that_goes_back_forgets_nothing() -> None:
    routing = RequestRouting()
    other = FakeUnit("other")
    routing.add("small", "a", 50, 1e6)
    assert routing.choose([SMALL, other], "a", 10, 0.0) is other
