from __future__ import annotations

from dataclasses import dataclass

from muxjax.scheduling.routing import least_loaded


@dataclass(frozen=True)
class FakeUnit:
    name: str
    token_seconds: float

    def seconds(self, model: str, num_tokens: int) -> float:
        return self.token_seconds * num_tokens


SLOW, FAST = FakeUnit("slow", 3.0), FakeUnit("quick", 1.0)


def test_faster_of_two_idle_units_is_chosen() -> None:
    assert least_loaded([SLOW, FAST], {"slow": 0.0, "quick": 0.0}, "a", 10) is FAST


def test_faster_unit_is_chosen_until_its_queue_is_too_long() -> None:
    assert least_loaded([SLOW, FAST], {"slow": 0.0, "quick": 19.0}, "a", 10) is FAST
    assert least_loaded([SLOW, FAST], {"slow": 0.0, "quick": 21.0}, "a", 10) is SLOW


def test_first_of_equal_units_is_chosen() -> None:
    other = FakeUnit("other", 3.0)
    assert least_loaded([SLOW, other], {"slow": 5.0, "other": 5.0}, "a", 10) is SLOW
    assert least_loaded([other], {"other": 5.0}, "a", 10) is other
