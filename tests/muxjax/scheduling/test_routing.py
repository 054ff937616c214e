from __future__ import annotations

from dataclasses import dataclass

from muxjax.scheduling.routing import least_loaded


@dataclass(frozen=True)
class Copy:
    name: str
    token_seconds: float

    def seconds(self, model: str, num_tokens: int) -> float:
        return self.token_seconds * num_tokens


SLOW, QUICK = Copy("slow", 3.0), Copy("quick", 1.0)


def test_of_two_that_idle_the_quicker_is_taken() -> None:
    assert least_loaded([SLOW, QUICK], {"slow": 0.0, "quick": 0.0}, "a", 10) is QUICK


def test_the_quicker_is_taken_until_its_queue_makes_up_for_it() -> None:
    assert least_loaded([SLOW, QUICK], {"slow": 0.0, "quick": 19.0}, "a", 10) is QUICK
    assert least_loaded([SLOW, QUICK], {"slow": 0.0, "quick": 21.0}, "a", 10) is SLOW


def test_of_equals_the_first_is_taken() -> None:
    other = Copy("other", 3.0)
    assert least_loaded([SLOW, other], {"slow": 5.0, "other": 5.0}, "a", 10) is SLOW
    assert least_loaded([other], {"other": 5.0}, "a", 10) is other
