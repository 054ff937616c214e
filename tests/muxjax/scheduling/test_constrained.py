"""Requests with a constraint: one token at a time, and the same tokens whatever happens around."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from muxjax.errors import InvalidRequest
from muxjax.scheduling.constraint import Constraint
from muxjax.scheduling.requests import Request
from muxjax.scheduling.steps import Decode
from muxjax.testing.mock_executor import VOCAB, mock_tokens
from tests.muxjax.scheduling.harness import Loop, request, solo_tokens, spec


class Residues:
    """Allows, at each place, the tokens that leave this remainder; complete after `length`."""

    def __init__(self, modulus: int, length: int, fails_after: int | None = None) -> None:
        self._modulus = modulus
        self._length = length
        self._fails_after = fails_after
        self.taken: list[int] = []

    @property
    def mask(self) -> np.ndarray:
        bits = np.zeros(-(-VOCAB // 32) * 32, bool)
        bits[len(self.taken) % self._modulus : VOCAB : self._modulus] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def advance(self, token: int) -> bool:
        assert token % self._modulus == len(self.taken) % self._modulus
        self.taken.append(token)
        if len(self.taken) == self._fails_after:
            raise InvalidRequest("too complex", field="grammar")
        return len(self.taken) == self._length

    def replay(self, tokens: Sequence[int]) -> Residues:
        other = Residues(self._modulus, self._length, self._fails_after)
        for token in tokens:
            other.advance(token)
        return other


def constrained(number: int, length: int, **more: int) -> Request:
    one = request(number, max_tokens=more.pop("max_tokens", 20))
    one.constraint = Residues(7, length, **more)
    return one


def alone(one: Request, length: int) -> list[int]:
    limit = one.params.max_tokens
    return mock_tokens(
        one.model, one.prompt, one.params, max_new_tokens=limit, constraint=Residues(7, length)
    )


def run(loop: Loop, *requests: Request) -> None:
    for one in requests:
        loop.unit.add(one)
    while loop.turn():
        pass
    assert all(one.finished for one in requests)


@pytest.mark.parametrize("policy", ["adbs", "fcfs", "round_robin"])
@pytest.mark.parametrize("pages", [100, 18])
def test_tokens_are_what_they_are_alone(policy: str, pages: int) -> None:
    """Also with so few pages that requests are preempted, and among requests without one."""
    loop = Loop.of([spec(max_model_len=32)], pages, policy)
    some = [constrained(number, 12 + number) for number in range(5)]
    free = [request(10 + number, max_tokens=24) for number in range(3)]
    run(loop, *some, *free)
    for number, one in enumerate(some):
        assert one.output == alone(one, 12 + number)
        assert one.finish_reason == "stop"
    for one in free:
        assert one.output == solo_tokens(loop.unit, one)
    assert (loop.unit.models["a"].preemptions > 0) == (pages == 18)


def test_steps_are_of_one_token_only_while_there_is_one() -> None:
    loop = Loop.of([spec()], 100)
    free = request(1, max_tokens=40)
    one = constrained(2, 5)
    run(loop, one, free)
    decodes = [step for step in loop.steps if isinstance(step, Decode)]
    with_masks = [
        number
        for number, step in enumerate(decodes)
        if any(sequence.mask is not None for sequence in step.sequences)
    ]
    assert len(with_masks) == 4  # its first token came with the prefill
    assert all(decodes[number].num_tokens == 1 for number in range(with_masks[-1] + 1))
    assert all(step.num_tokens > 1 for step in decodes[with_masks[-1] + 3 : -1])
    # The other sequence is in every step, this one in every other.
    assert all(any(s.request_id == 1 for s in step.sequences) for step in decodes)
    assert np.diff(with_masks).max() <= 2


def test_a_limit_and_a_stop_id_end_it_as_any_other() -> None:
    loop = Loop.of([spec()], 100)
    cut = constrained(1, 10, max_tokens=3)
    stopped = constrained(2, 10)
    expected = alone(stopped, 10)
    stopped.stop_ids = (expected[4],)
    exact = constrained(3, 3, max_tokens=3)
    run(loop, cut, stopped, exact)
    assert (cut.finish_reason, cut.output) == ("length", alone(constrained(1, 10), 10)[:3])
    assert (stopped.finish_reason, stopped.output) == ("stop", expected[:5])
    assert exact.finish_reason == "stop"  # complete with its last token


def test_a_constraint_that_cannot_go_on_ends_its_own_request() -> None:
    loop = Loop.of([spec()], 100)
    broken = constrained(1, 10, fails_after=3)
    free = request(2, max_tokens=9)
    run(loop, broken, free)
    assert (broken.finish_reason, str(broken.error)) == ("error", "too complex")
    assert free.output == solo_tokens(loop.unit, free)
    assert isinstance(broken.constraint, Constraint)
