"""Results of steps are applied to their requests."""

from __future__ import annotations

import pytest

from muxjax.scheduling.steps import StepResult
from tests.muxjax.scheduling.harness import Loop, isolated_tokens, request, spec


def test_a_stop_id_ends_the_request_and_is_kept_in_its_tokens() -> None:
    loop = Loop.create([spec("a", decode_tokens=4)], 200)
    tokens = isolated_tokens(loop.scheduler, request(0, max_tokens=12))
    assert len(set(tokens)) == len(tokens)
    req = request(0, max_tokens=12, stop_ids=[tokens[6]])
    loop.scheduler.add(req)
    loop.run()
    assert req.output == tokens[:7]
    assert req.finish_reason == "stop"
    assert loop.updates[-1].tokens == tokens[5:7]
    assert loop.updates[-1].finish_reason == "stop"
    loop.assert_empty()


def test_a_stop_id_as_the_first_token() -> None:
    loop = Loop.create([spec("a")], 200)
    first = isolated_tokens(loop.scheduler, request(0))[0]
    req = request(0, stop_ids=[first])
    loop.scheduler.add(req)
    loop.run()
    assert req.output == [first]
    assert req.finish_reason == "stop"
    loop.assert_empty()


def test_logprobs_come_with_their_tokens() -> None:
    loop = Loop.create([spec("a", decode_tokens=2)], 60)
    loop.scheduler.add(request(0, max_tokens=4, logprobs=2))
    loop.scheduler.add(request(1, max_tokens=4))
    loop.run()
    for update in loop.updates:
        if update.request.id == 1:
            assert update.logprobs is None
            continue
        assert update.logprobs is not None
        for token, logprobs in zip(update.tokens, update.logprobs, strict=True):
            assert logprobs.logprob == -float(token % 10)
            assert logprobs.top[0] == (token, logprobs.logprob)
            assert len(logprobs.top) == 2


def test_tokens_after_a_requests_end_are_an_error() -> None:
    loop = Loop.create([spec("a")], 100)
    loop.scheduler.add(request(0, stop_ids=[7]))
    step = loop.scheduler.next_step(0.0)
    assert step is not None
    with pytest.raises(ValueError, match="after its end"):
        loop.scheduler.apply(step, StepResult([[7, 8]], [None], 0.0, 0.1), 0.0)
