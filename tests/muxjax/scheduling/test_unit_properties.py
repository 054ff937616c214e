"""Random workloads on small pools: all requests end, with their isolated output."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxjax.errors import PoolTooSmall
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.policies.registry import create_policy, policy_names
from muxjax.scheduling.requests import Request, RequestUpdate
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import ModelSpec
from muxjax.scheduling.steps import Prefill
from muxjax.testing.mock_executor import MockLatency
from tests.muxjax.scheduling.harness import Loop, isolated_tokens, spec


@dataclass
class Arrival:
    """A request, its time of arrival, and how the caller ends it, if it does."""

    model: str
    prompt: list[int]
    params: dict[str, float | int | str | None]
    stops: bool
    turn: int
    cancel_after: int | None
    stop_string_after: int | None

    def request(self, number: int) -> Request:
        # One token in ten ends the request, if any does.
        stop_ids = tuple(range(number % 10, 1009, 10)) if self.stops else ()
        return Request(number, self.model, self.prompt, SamplingParams(**self.params), stop_ids)


def models(burst: int, floors: list[float | None], replicas: int = 1) -> list[ModelSpec]:
    """Three models of different depth, page capacity, length and limits, the first replicated."""
    a = spec("a", 2, 4, 24, max_seqs=6, decode_tokens=burst, kv_floor=floors[0], replicas=replicas)
    b = spec("b", 3, 2, 16, max_seqs=3, decode_tokens=4, kv_floor=floors[1])
    c = spec("c", 5, 7, 40, prefill_tokens=8, prefill_seqs=2, kv_floor=floors[2])
    return [a, b, c]


def smallest_pool(specs: list[ModelSpec]) -> int:
    """Number of pages of the smallest pool that these models accept."""
    for pages in range(10, 400):
        try:
            Scheduler(specs, pages, create_policy("adbs"))
        except PoolTooSmall:
            continue
        return pages
    raise AssertionError("no pool is large enough")


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    model, limit = draw(st.sampled_from([("a", 24), ("b", 16), ("c", 40)]))
    # Many prompts have a common prefix.
    first = draw(st.sampled_from([1, 2]) | st.integers(0, 1008))
    length = draw(st.integers(1, limit - 1))
    return Arrival(
        model,
        prompt=[(first + i * i) % 1009 for i in range(length)],
        params={
            "max_tokens": draw(st.integers(1, limit)),
            "temperature": draw(st.sampled_from([0.0, 1.0])),
            "seed": draw(st.integers(0, 99)),
            "presence_penalty": draw(st.sampled_from([0.0, 0.5])),
            "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 1.5])),
            "logprobs": draw(st.sampled_from([None, 1])),
            "prompt_logprobs": draw(st.sampled_from([None, None, 0])),
            "cache_salt": draw(st.sampled_from([None, None, "mine"])),
        },
        stops=draw(st.sampled_from([False, False, True])),
        turn=draw(st.integers(0, 30)),
        cancel_after=draw(st.none() | st.none() | st.integers(0, 20)),
        stop_string_after=draw(st.none() | st.none() | st.integers(1, 10)),
    )


@pytest.mark.parametrize("policy", policy_names())
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_workloads(policy: str, data: st.DataObject) -> None:
    floors = data.draw(
        st.sampled_from([[None] * 3, [0.0] * 3, [0.3, None, 0.2], [None, 0.5, None]]), "floors"
    )
    replicas = data.draw(st.sampled_from([1, 1, 2, 3]), "replicas")
    specs = models(data.draw(st.sampled_from([1, 4, 8]), "burst"), floors, replicas)
    pages = smallest_pool(specs) + data.draw(st.integers(0, 60), "more pages")
    cache = data.draw(st.sampled_from([True, True, False]), "prefix cache")
    loop = Loop.create(specs, pages, policy, prefix_cache=cache)
    loop.depth = data.draw(st.sampled_from([1, 1, 0, 2]), "depth")
    if data.draw(st.booleans(), "slow"):  # so that quotas move while it runs
        loop.executor.latency = MockLatency(prefill=0.5, decode=0.2)
    drawn = data.draw(st.lists(arrivals(), min_size=1, max_size=16), "arrivals")
    drawn.sort(key=lambda arrival: arrival.turn)
    todo = [(arrival, arrival.request(number)) for number, arrival in enumerate(drawn)]

    def stop_strings(update: RequestUpdate) -> None:
        limit = drawn[update.request.id].stop_string_after
        if limit is not None and len(update.request.output) >= limit:
            loop.scheduler.finish(update.request, "stop")

    loop.on_update = stop_strings
    # No request starves: upper bound of all steps, including those repeated after preemption.
    work = sum(len(req.prompt) + req.params.max_tokens for _, req in todo)
    max_turns = 60 + 4 * work
    waiting, turn = list(todo), 0
    while True:
        assert turn < max_turns
        while waiting and waiting[0][0].turn <= turn:
            loop.scheduler.add(waiting.pop(0)[1])
        for arrival, req in todo:
            if arrival.cancel_after is not None and turn == arrival.turn + arrival.cancel_after:
                loop.scheduler.cancel(req.id)
        if not loop.turn() and not waiting:
            break
        turn += 1

    loop.assert_empty()
    for arrival, req in todo:
        tokens = isolated_tokens(loop.scheduler, req)
        updates = [update for update in loop.updates if update.request is req]
        assert req.finished
        assert [token for update in updates for token in update.tokens] == req.output
        assert req.output == tokens[: len(req.output)]
        for update in updates:
            assert (update.logprobs is None) == (req.params.logprobs is None)
        if len(req.output) == len(tokens):
            continue
        by_string = arrival.stop_string_after
        if req.finish_reason == "stop":
            assert by_string is not None
            assert len(req.output) >= by_string
        else:
            assert req.finish_reason == "cancelled"
            assert arrival.cancel_after is not None


@pytest.mark.parametrize("policy", policy_names())
def test_many_requests_on_the_smallest_pool_are_admitted_in_order(policy: str) -> None:
    specs = models(4, [None, None, None])
    loop = Loop.create(specs, smallest_pool(specs), policy)
    requests = []
    for number in range(60):
        model = specs[number % 3]
        prompt = [
            (number * 13 + i) % 1009 for i in range(1 + number * 7 % (model.max_model_len - 1))
        ]
        requests.append(Request(number, model.name, prompt, SamplingParams(max_tokens=40)))
        loop.scheduler.add(requests[-1])
    loop.run()
    loop.assert_empty()
    for req in requests:
        assert req.output == isolated_tokens(loop.scheduler, req)
    assert sum(req.preemptions for req in requests) > 0
    # First admissions of a model follow the order of arrival, except deferred requests.
    for model in specs:
        seen = list(
            dict.fromkeys(
                chunk.request_id
                for step in loop.steps
                if isinstance(step, Prefill) and step.model == model.name
                for chunk in step.chunks
            )
        )
        not_deferred = [number for number in seen if not requests[number].deferred]
        assert not_deferred == sorted(not_deferred)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_each_replica_runs_sequences_in_the_same_pool(replicas: int) -> None:
    # Each request needs six blocks, and the pool has six per replica.
    model = spec("a", 2, 4, 24, max_seqs=6, prefill_tokens=64, kv_floor=0.0, replicas=replicas)
    loop = Loop.create([model], 2 + 2 * 6, "fcfs", prefix_cache=False)
    requests = [
        Request(number, "a", [number + 1] * 20, SamplingParams(max_tokens=4, temperature=0.0), ())
        for number in range(6)
    ]
    for request in requests:
        loop.scheduler.add(request)
    max_running = 0
    for _ in range(500):
        if not loop.turn():
            break
        max_running = max(max_running, len(loop.scheduler.models["a"].holders()))
    assert max_running == replicas
    assert [request.output for request in requests] == [
        isolated_tokens(loop.scheduler, request) for request in requests
    ]
    assert not any(request.preemptions for request in requests)
    loop.assert_empty()
