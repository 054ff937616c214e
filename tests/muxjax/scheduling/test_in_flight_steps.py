from __future__ import annotations

import numpy as np
import pytest

from muxjax.scheduling.in_flight_steps import InFlightSteps
from muxjax.scheduling.steps import Prefill
from tests.muxjax.scheduling.harness import request


def three_steps(*, concurrent: bool) -> tuple[InFlightSteps, list[Prefill]]:
    """Three steps in flight of three models."""
    in_flight, steps = InFlightSteps(concurrent=concurrent), [Prefill(name, []) for name in "abc"]
    for step in steps:
        in_flight.begin(step, (step.model, "prefill"), 0.5, [])
    return in_flight, steps


def test_steps_end_in_order() -> None:
    in_flight, steps = three_steps(concurrent=False)
    with pytest.raises(ValueError, match="in the order"):
        in_flight.end(steps[1])
    assert [in_flight.end(step).number for step in steps] == [1, 2, 3]
    assert not in_flight
    assert in_flight.started == 3
    with pytest.raises(ValueError, match="in the order"):
        in_flight.end(steps[0])


def test_concurrent_steps_end_in_any_order() -> None:
    in_flight, steps = three_steps(concurrent=True)
    assert in_flight.end(steps[1]).step is steps[1]
    assert in_flight.step_keys() == [("a", "prefill"), ("c", "prefill")]


def test_requests_in_steps_in_flight() -> None:
    in_flight, steps = three_steps(concurrent=True)
    first = request(0)
    first.dispatch(1, 2)
    assert not in_flight.is_settled(first)
    last = np.array([0, 2, 3, 7])
    assert in_flight.busy_slots(last).tolist() == [False, True, True, False]
    in_flight.end(steps[1])
    assert in_flight.is_settled(first)
    assert in_flight.busy_slots(last).tolist() == [False, False, True, False]
