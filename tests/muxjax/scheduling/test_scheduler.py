from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from muxjax.errors import InvalidRequest, PoolTooSmall, UnknownModel
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.requests import Request, RequestState
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import Demand, ModelSpec
from muxjax.scheduling.steps import Decode, Prefill, StepResult
from muxjax.testing.mock_executor import MockExecutor
from tests.muxjax.scheduling.harness import Loop, isolated_tokens, request, spec


def test_single_request_step_by_step() -> None:
    loop = Loop.create([spec("a", 2, 4, decode_tokens=4)], 40)
    req = request(0, prompt_tokens=5, max_tokens=7)
    loop.scheduler.add(req)
    assert req.state is RequestState.WAITING

    loop.turn()
    prefill = loop.steps[0]
    assert isinstance(prefill, Prefill)
    (chunk,) = prefill.chunks
    assert chunk.tokens == tuple(req.prompt)
    assert chunk.last
    assert (chunk.start, chunk.num_prompt_tokens, chunk.max_new_tokens) == (0, 5, 7)
    assert chunk.num_blocks == 2
    assert req.state is RequestState.RUNNING
    assert (len(req.output), req.pending) == (0, 1)

    loop.turn()  # the decode is chosen before the first token is known
    decode = loop.steps[1]
    assert isinstance(decode, Decode)
    assert decode.num_tokens == 4
    assert decode.sequences[0].num_blocks == 3  # 5 tokens of prompt and 4 more
    assert (len(req.output), req.pending) == (1, 4)

    loop.run()
    assert loop.shapes == ["P5", "D4", "D2"]
    assert [len(update.tokens) for update in loop.updates] == [1, 4, 2]
    assert [update.finish_reason for update in loop.updates] == [None, None, "length"]
    assert req.output == isolated_tokens(loop.scheduler, req)
    assert req.finish_reason == "length"
    loop.assert_empty()


def test_next_step_is_none_while_all_tokens_are_in_flight() -> None:
    loop = Loop.create([spec("a")], 200)
    loop.scheduler.add(request(0, max_tokens=1))
    assert loop.scheduler.next_step(0.0) is not None
    assert loop.scheduler.next_step(0.0) is None
    assert loop.scheduler.num_in_flight == 1


def test_a_request_ends_at_the_length_limit_of_its_model() -> None:
    loop = Loop.create([spec("a", max_model_len=20)], 200)
    req = request(0, prompt_tokens=17, max_tokens=50)
    loop.scheduler.add(req)
    assert req.max_new_tokens == 3
    loop.run()
    assert len(req.output) == 3
    assert req.finish_reason == "length"


def test_request_ended_by_the_host_receives_no_more_tokens() -> None:
    loop = Loop.create([spec("a", decode_tokens=2)], 200)
    ended, other = request(0, max_tokens=20), request(1, max_tokens=20)

    def stop_string(update) -> None:
        if update.request is ended and len(ended.output) >= 5:
            loop.scheduler.finish(ended, "stop", now=1.0)

    loop.on_update = stop_string
    loop.scheduler.add(ended)
    loop.scheduler.add(other)
    loop.run()
    assert ended.output == isolated_tokens(loop.scheduler, ended)[:5]
    assert ended.finish_reason == "stop"
    assert ended.finished_at == 1.0
    assert other.output == isolated_tokens(loop.scheduler, other)
    loop.scheduler.finish(ended, "error")
    assert ended.finish_reason == "stop"
    loop.assert_empty()


@pytest.mark.parametrize("turns", range(8))
def test_cancellation_at_any_time_frees_pages_and_slots(turns: int) -> None:
    loop = Loop.create([spec("a", max_seqs=2, prefill_tokens=4, decode_tokens=2)], 60)
    requests = [request(i, prompt_tokens=6, max_tokens=5) for i in range(3)]
    for req in requests:
        loop.scheduler.add(req)
    for _ in range(turns):
        loop.turn()
    for number in (0, 2):
        ended = requests[number].finished
        assert loop.scheduler.cancel(number) != ended
        assert not loop.scheduler.cancel(number)
    loop.run()
    assert requests[1].output == isolated_tokens(loop.scheduler, requests[1])
    loop.assert_empty()


def test_preemption_does_not_change_output_with_penalty_and_seed() -> None:
    loop = Loop.create([spec("a", 1, 4, 36, decode_tokens=1)], 1 + 9)
    params = SamplingParams(max_tokens=20, seed=5, presence_penalty=0.5)
    requests = [Request(i, "a", [i, 2, 3, 4, 5, 6, 7, 8], params) for i in range(2)]
    for req in requests:
        loop.scheduler.add(req)
    loop.run()
    assert requests[1].preemptions > 0
    for req in requests:
        assert req.output == isolated_tokens(loop.scheduler, req)


def test_invalid_requests_are_rejected() -> None:
    scheduler = Loop.create([spec("a", max_model_len=20), spec("b")], 200).scheduler
    with pytest.raises(UnknownModel, match="no model 'c'; there are a, b"):
        scheduler.add(request(0, "c"))
    with pytest.raises(InvalidRequest, match="empty"):
        scheduler.add(request(0, prompt_tokens=0))
    with pytest.raises(InvalidRequest, match="20 tokens; a accepts at most 19") as error:
        scheduler.add(request(0, prompt_tokens=20))
    assert error.value.field == "prompt"
    scheduler.add(request(0))
    with pytest.raises(ValueError, match="id 0 is in use"):
        scheduler.add(request(0))
    assert scheduler.num_requests == 1


def test_invalid_units_are_rejected() -> None:
    with pytest.raises(PoolTooSmall, match="deep needs 9 pages for one block"):
        Scheduler([spec("deep", 9)], 17, create_policy("adbs"))
    with pytest.raises(ValueError, match="distinct names"):
        Scheduler([spec("a"), spec("a")], 100, create_policy("adbs"))
    with pytest.raises(ValueError, match="at least one model"):
        Scheduler([], 100, create_policy("adbs"))


def test_results_must_be_applied_in_order() -> None:
    loop = Loop.create([spec("a")], 100)
    loop.scheduler.add(request(0))
    first, second = loop.scheduler.next_step(0.0), loop.scheduler.next_step(0.0)
    assert first is not None
    assert second is not None
    with pytest.raises(ValueError, match="in the order"):
        loop.scheduler.apply(second, StepResult([[1]], [None], 0.0, 0.1), 0.0)


def test_freed_pages_are_reported_for_poisoning() -> None:
    specs = [spec("a", 2, 4)]
    scheduler = Scheduler(specs, 40, create_policy("adbs"), record_freed=True)
    executor = MockExecutor(specs, 40)
    scheduler.add(request(0, prompt_tokens=5, max_tokens=1))
    step = scheduler.next_step(0.0)
    assert step is not None
    scheduler.apply(step, executor.result(executor.submit(step)), 0.0)
    assert sorted(scheduler.take_freed_pages()) == [2, 3, 4, 5]


def test_times_are_recorded() -> None:
    loop = Loop.create([spec("a", decode_tokens=4)], 100)
    req = request(0, prompt_tokens=5, max_tokens=5)
    loop.scheduler.add(req)
    loop.run()
    assert req.first_token_at == pytest.approx(2e-3 + 5e-4)
    assert req.finished_at == pytest.approx(2e-3 + 5e-4 + 4 * 1.01e-3)


def test_stats_count_requests_pages_and_time() -> None:
    loop = Loop.create([spec("a", decode_tokens=4, kv_floor=0.25), spec("b", 3)], 100)
    loop.scheduler.add(request(0, max_tokens=5))
    loop.scheduler.add(request(1, max_tokens=50))
    loop.scheduler.add(request(2, "b"))
    loop.turn()
    stats = loop.scheduler.stats()
    assert json.loads(json.dumps(stats)) == stats
    a, b = stats["models"]["a"], stats["models"]["b"]
    assert (a["running"], a["waiting"], b["running"], b["waiting"]) == (2, 0, 0, 1)
    assert a["kv_pages_used"] == 2 * 2 * 3
    assert a["kv_pages_leased"] >= a["kv_pages_used"]
    assert a["kv_pages_quota"] + b["kv_pages_quota"] == stats["usable_pages"]
    assert a["kv_pages_floor"] <= 0.25 * stats["usable_pages"]
    loop.run()
    stats = loop.scheduler.stats()
    a = stats["models"]["a"]
    assert (a["prompt_tokens"], a["output_tokens"], a["finished"]) == (10, 55, 2)
    assert stats["requests"] == 0
    assert stats["free_pages"] == stats["usable_pages"]
    busy = sum(
        model[f"{phase}_seconds"]
        for model in stats["models"].values()
        for phase in ("prefill", "decode")
    )
    assert busy == pytest.approx(loop.executor.now)
    shares = sum(
        model[f"{phase}_share"]
        for model in stats["models"].values()
        for phase in ("prefill", "decode")
    )
    assert shares == pytest.approx(1)


def test_shares_are_recomputed_from_newer_estimates() -> None:
    evaluated: list[str] = []

    def demand(models: Sequence[ModelSpec], estimates) -> dict[str, Demand]:
        evaluated.extend(model.name for model in models)
        return {
            model.name: Demand(model.load.rate, 0.0, estimates.decode(model.name, 1))
            for model in models
        }

    specs = [spec("a", rate=3.0), spec("b", rate=1.0)]
    scheduler = Scheduler(specs, 2 + 2 * 40, create_policy("adbs"), demand=demand)
    assert scheduler.quotas.quotas == {"a": 30, "b": 10}
    assert scheduler.fair_share.shares["a", "decode"] == scheduler.fair_share.shares["b", "decode"]
    scheduler.next_step(0.0)
    scheduler.estimates.observe_decode("a", 1, 1, 0.2)
    scheduler.next_step(1.0)
    assert evaluated == ["a", "b"]
    scheduler.next_step(60.0)
    assert evaluated == ["a", "b"] * 2
    assert (
        scheduler.fair_share.shares["a", "decode"] > 5 * scheduler.fair_share.shares["b", "decode"]
    )
