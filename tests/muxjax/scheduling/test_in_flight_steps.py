from __future__ import annotations

import numpy as np
import pytest

from muxjax.scheduling.in_flight_steps import InFlightSteps
from muxjax.scheduling.steps import Prefill
from tests.muxjax.scheduling.harness import request


def flying(*, concurrent: bool) -> tuple[InFlightSteps, list[Prefill]]:
    """Three steps of three models, and where they are kept."""
    flights, steps = InFlightSteps(concurrent=concurrent), [Prefill(name, []) for name in "abc"]
    for step in steps:
        flights.begin(step, (step.model, "prefill"), 0.5, [])
    return flights, steps


def test_steps_end_in_the_order_in_which_they_were_made() -> None:
    flights, steps = flying(concurrent=False)
    with pytest.raises(ValueError, match="in the order"):
        flights.end(steps[1])
    assert [flights.end(step).number for step in steps] == [1, 2, 3]
    assert not flights
    assert flights.made == 3
    with pytest.raises(ValueError, match="in the order"):
        flights.end(steps[0])


def test_steps_side_by_side_end_in_any_order() -> None:
    flights, steps = flying(concurrent=True)
    assert flights.end(steps[1]).step is steps[1]
    assert flights.turns() == [("a", "prefill"), ("c", "prefill")]


def test_who_is_being_worked_on() -> None:
    flights, steps = flying(concurrent=True)
    one = request(0)
    one.dispatch(1, 2)
    assert not flights.settled(one)
    last = np.array([0, 2, 3, 7])
    assert flights.work_on(last).tolist() == [False, True, True, False]
    flights.end(steps[1])
    assert flights.settled(one)
    assert flights.work_on(last).tolist() == [False, False, True, False]
