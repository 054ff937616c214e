"""Requests with a constraint: one token at a time, with their isolated output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from muxjax.errors import InvalidRequest
from muxjax.scheduling.constraint import Constraint
from muxjax.scheduling.requests import Request
from muxjax.scheduling.steps import Decode
from muxjax.testing.mock_executor import VOCAB, mock_tokens
from tests.muxjax.scheduling.harness import Loop, isolated_tokens, request, spec


class Residues:
    """Allows token `t` at position `i` if `t % modulus == i % modulus`; complete at `length`."""

    def __init__(self, modulus: int, length: int, fails_after: int | None = None) -> None:
        self._modulus = modulus
        self._length = length
        self._fails_after = fails_after
        self.accepted: list[int] = []

    @property
    def mask(self) -> np.ndarray:
        bits = np.zeros(-(-VOCAB // 32) * 32, bool)
        bits[len(self.accepted) % self._modulus : VOCAB : self._modulus] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def advance(self, token: int) -> bool:
        assert token % self._modulus == len(self.accepted) % self._modulus
        self.accepted.append(token)
        if len(self.accepted) == self._fails_after:
            raise InvalidRequest("too complex", field="grammar")
        return len(self.accepted) == self._length

    def replay(self, tokens: Sequence[int]) -> Residues:
        other = Residues(self._modulus, self._length, self._fails_after)
        for token in tokens:
            other.advance(token)
        return other


def constrained(number: int, length: int, **options: int) -> Request:
    req = request(number, max_tokens=options.pop("max_tokens", 20))
    req.constraint = Residues(7, length, **options)
    return req


def isolated_output(req: Request, length: int) -> list[int]:
    limit = req.params.max_tokens
    return mock_tokens(
        req.model, req.prompt, req.params, max_new_tokens=limit, constraint=Residues(7, length)
    )


def run(loop: Loop, *requests: Request) -> None:
    for req in requests:
        loop.scheduler.add(req)
    while loop.turn():
        pass
    assert all(req.finished for req in requests)


@pytest.mark.parametrize("policy", ["adbs", "fcfs", "round_robin"])
@pytest.mark.parametrize("pages", [100, 18])
def test_constrained_output_equals_isolated_output(policy: str, pages: int) -> None:
    """With 18 pages, requests are preempted. Requests without a constraint run beside them."""
    loop = Loop.create([spec(max_model_len=32)], pages, policy)
    limited = [constrained(number, 12 + number) for number in range(5)]
    free = [request(10 + number, max_tokens=24) for number in range(3)]
    run(loop, *limited, *free)
    for number, req in enumerate(limited):
        assert req.output == isolated_output(req, 12 + number)
        assert req.finish_reason == "stop"
    for req in free:
        assert req.output == isolated_tokens(loop.scheduler, req)
    assert (loop.scheduler.models["a"].preemptions > 0) == (pages == 18)


def test_decodes_have_one_token_while_a_constrained_request_runs() -> None:
    loop = Loop.create([spec()], 100)
    free = request(1, max_tokens=40)
    limited = constrained(2, 5)
    run(loop, limited, free)
    decodes = [step for step in loop.steps if isinstance(step, Decode)]
    with_masks = [
        number
        for number, step in enumerate(decodes)
        if any(sequence.mask is not None for sequence in step.sequences)
    ]
    assert len(with_masks) == 4  # the first token is sampled by the prefill
    assert all(decodes[number].num_tokens == 1 for number in range(with_masks[-1] + 1))
    assert all(step.num_tokens > 1 for step in decodes[with_masks[-1] + 3 : -1])
    # The free sequence is in every step, the constrained one in every other step.
    assert all(any(s.request_id == 1 for s in step.sequences) for step in decodes)
    assert np.diff(with_masks).max() <= 2


def test_length_limit_and_stop_id_end_a_constrained_request() -> None:
    loop = Loop.create([spec()], 100)
    truncated = constrained(1, 10, max_tokens=3)
    stopped = constrained(2, 10)
    expected = isolated_output(stopped, 10)
    stopped.stop_ids = (expected[4],)
    exact = constrained(3, 3, max_tokens=3)
    run(loop, truncated, stopped, exact)
    assert (truncated.finish_reason, truncated.output) == (
        "length",
        isolated_output(constrained(1, 10), 10)[:3],
    )
    assert (stopped.finish_reason, stopped.output) == ("stop", expected[:5])
    assert exact.finish_reason == "stop"  # complete with its last token


def test_failing_constraint_ends_only_its_request() -> None:
    loop = Loop.create([spec()], 100)
    broken = constrained(1, 10, fails_after=3)
    free = request(2, max_tokens=9)
    run(loop, broken, free)
    assert (broken.finish_reason, str(broken.error)) == ("error", "too complex")
    assert free.output == isolated_tokens(loop.scheduler, free)
    assert isinstance(broken.constraint, Constraint)
