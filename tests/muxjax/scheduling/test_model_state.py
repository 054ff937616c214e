from __future__ import annotations

from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request
from tests.muxjax.scheduling.harness import spec


def waiting(state: ModelState, *orders: int) -> dict[int, Request]:
    requests = {}
    for order in orders:
        requests[order] = Request(order, "a", [1], order=order)
        state.waiting[order] = requests[order]
    return requests


def test_preempted_requests_come_back_in_the_order_of_arrival() -> None:
    state = ModelState(spec())
    requests = waiting(state, 0, 1, 2, 3, 4)
    for order in (0, 1, 2):
        del state.waiting[order]
    for order in (1, 0, 2):
        state.requeue(requests[order])
    assert list(state.waiting) == [0, 1, 2, 3, 4]


def test_groups_stay_in_order_when_an_older_request_joins() -> None:
    state = ModelState(spec())
    requests = waiting(state, 0, 1, 2)
    for order in (1, 2, 0):
        state.remove(requests[order])
        state.start_prefill(requests[order])
    assert list(state.prefilling) == [0, 1, 2]
    for order in (2, 0, 1):
        state.start_decode(requests[order])
    assert list(state.running) == [0, 1, 2]
    assert not state.has_prefill
    assert state.has_decode
