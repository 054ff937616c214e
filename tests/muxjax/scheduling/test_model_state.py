from __future__ import annotations

from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request
from tests.muxjax.scheduling.harness import spec


def waiting(state: ModelState, *orders: int) -> dict[int, Request]:
    requests = {}
    for order in orders:
        requests[order] = Request(order, "a", [1], order=order)
        state.enqueue(requests[order])
    return requests


def test_requeued_requests_keep_the_order_of_arrival() -> None:
    state = ModelState(spec())
    requests = waiting(state, 0, 1, 2, 3, 4)
    for order in (0, 1, 2):
        state.remove(requests[order])
    for order in (1, 0, 2):
        state.requeue(requests[order])
    assert list(state.waiting) == [0, 1, 2, 3, 4]


def test_first_is_the_head_of_the_queue() -> None:
    state = ModelState(spec())
    assert state.first is None
    requests = waiting(state, 3, 4, 5, 1)
    assert state.first is requests[1]
    state.remove(requests[4])
    assert state.first is requests[1]
    state.defer(requests[1])
    assert state.first is requests[3]
    state.requeue(requests[4])
    state.remove(requests[3])
    assert state.first is requests[4]
    for order in (4, 5):
        state.remove(requests[order])
    assert state.first is None
    requests[1].order = 6
    state.recall(requests[1])
    assert state.first is requests[1]


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
