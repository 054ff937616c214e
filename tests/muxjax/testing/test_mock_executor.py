from __future__ import annotations

import dataclasses

import pytest

from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.specs import BucketLimits, ModelSpec
from muxjax.scheduling.steps import (
    Decode,
    DecodeSequence,
    Executor,
    PoisonsPages,
    Prefill,
    PrefillChunk,
)
from muxjax.testing.mock_executor import MockExecutor, MockLatency, MockPoolError, mock_tokens

GREEDY = SamplingParams(temperature=0.0)
# Two layers, two tokens a page; the dummy block is pages 0 and 1. The salt of "a" is 97.
A = ModelSpec("a", 2, 2, 16, BucketLimits(2, 8, 2, 4))


def executor(**latency: float) -> MockExecutor:
    return MockExecutor([A], 20, latency=MockLatency(**latency), vocab=100)


def chunk(
    tokens: tuple[int, ...] = (1, 2, 3),
    blocks: tuple[int, ...] = (2, 4),
    *,
    number: int = 0,
    start: int = 0,
    max_new_tokens: int = 4,
    stop_ids: tuple[int, ...] = (),
    params: SamplingParams | None = GREEDY,
) -> PrefillChunk:
    """A chunk; by default its request's only one."""
    return PrefillChunk(
        number, number, tokens, start, 3, blocks, len(blocks), params, max_new_tokens, stop_ids
    )


def prefill(mock: MockExecutor, *chunks: PrefillChunk) -> list[list[int]]:
    return mock.result(mock.submit(Prefill("a", chunks))).tokens


def decode(
    mock: MockExecutor, k: int, blocks: tuple[int, ...] = (2, 4, 6, 8), *, number: int = 0
) -> list[int]:
    sequence = DecodeSequence(number, number, blocks, len(blocks), k)
    return mock.result(mock.submit(Decode("a", [sequence], k))).tokens[0]


def test_it_is_an_executor() -> None:
    assert isinstance(executor(), Executor)


def test_tokens_follow_the_documented_formula() -> None:
    mock = executor()
    # 31 * (1 + 2 + 3) + 7 * 3 + 97 = 304, and so on.
    assert prefill(mock, chunk()) == [[4]]
    assert decode(mock, 2) == [35, 27]  # 31 * 10 + 28 + 97 = 435; 31 * 45 + 35 + 97 = 1527
    assert decode(mock, 1) == [71]  # 31 * 72 + 42 + 97 = 2371
    assert mock_tokens("a", [1, 2, 3], GREEDY, max_new_tokens=4, vocab=100) == [4, 35, 27, 71]


def test_sampling_adds_the_seed_and_penalties_add_the_output_length() -> None:
    seeded = SamplingParams(seed=5, presence_penalty=0.5)
    mock = executor()
    assert prefill(mock, chunk(params=seeded)) == [[9]]
    assert decode(mock, 1) == [96]  # 31 * 15 + 28 + 97 + 5 + 1
    assert mock_tokens("a", [1, 2, 3], seeded, max_new_tokens=2, vocab=100) == [9, 96]


def test_a_slot_ends_at_max_new_tokens() -> None:
    mock = executor()
    prefill(mock, chunk(max_new_tokens=3))
    assert len(decode(mock, 4)) == 2
    assert decode(mock, 4) == []


def test_a_slot_ends_at_a_stop_id() -> None:
    mock = executor()
    prefill(mock, chunk(stop_ids=(35,)))
    assert decode(mock, 3) == [35]
    assert decode(mock, 3) == []
    assert mock_tokens("a", [1, 2, 3], GREEDY, max_new_tokens=4, stop_ids=[35], vocab=100) == [
        4,
        35,
    ]


def test_a_prompt_in_two_chunks_has_the_same_token() -> None:
    mock = executor()
    assert prefill(mock, chunk((1, 2), (2,), params=None)) == [[]]
    assert prefill(mock, chunk((3,), start=2)) == [[4]]


def test_a_preempted_request_resumes() -> None:
    mock = executor()
    assert prefill(mock, chunk((1, 2, 3, 4, 35), (2, 4, 6))) == [[27]]
    assert decode(mock, 4) == [71]  # two of four were emitted before


def test_logprobs() -> None:
    mock = executor()
    params = dataclasses.replace(GREEDY, logprobs=2)
    result = mock.result(mock.submit(Prefill("a", [chunk(params=params)])))
    (logprobs,) = result.logprobs
    assert logprobs is not None
    assert logprobs[0].logprob == -4.0
    assert logprobs[0].top == [(4, -4.0), (5, -5.0)]


def test_steps_run_in_sequence_on_the_simulated_clock() -> None:
    mock = executor(prefill=1.0, prefill_token=0.1, decode=0.5, decode_sequence=0.25)
    first = mock.submit(Prefill("a", [chunk()]))
    second = mock.submit(Decode("a", [DecodeSequence(0, 0, (2, 4, 6), 3, 2)], 2))
    assert mock.now == 0.0
    result = mock.result(first)
    assert (result.started, result.seconds) == (0.0, pytest.approx(1.3))
    assert mock.now == pytest.approx(1.3)
    result = mock.result(second)
    assert (result.started, result.seconds) == (pytest.approx(1.3), pytest.approx(1.5))
    assert mock.now == pytest.approx(2.8)
    assert mock.steps == 2


def test_reading_a_page_of_another_request_raises() -> None:
    mock = executor()
    prefill(mock, chunk(), chunk(number=1, blocks=(6, 8)))
    with pytest.raises(MockPoolError, match="page 4 should hold 1 tokens of"):
        decode(mock, 1, (2, 4), number=1)


def test_reading_an_overwritten_page_raises() -> None:
    mock = executor()
    prefill(mock, chunk())
    prefill(mock, chunk(number=1, blocks=(6, 3)))  # overlaps the block at page 2 in one layer
    with pytest.raises(MockPoolError, match="page 4 should hold"):
        decode(mock, 1)


def test_reading_swapped_blocks_raises() -> None:
    mock = executor()
    prefill(mock, chunk())
    with pytest.raises(MockPoolError, match="page 2 should hold"):
        decode(mock, 1, (4, 2))


def test_reading_a_poisoned_page_raises() -> None:
    mock = executor()
    prefill(mock, chunk())
    mock.poison([8, 9])
    assert decode(mock, 1) == [35]
    mock.poison([5])
    with pytest.raises(MockPoolError, match="page 5 should hold"):
        decode(mock, 1)


def test_a_poisoned_page_can_be_written_by_its_next_owner() -> None:
    mock = executor()
    prefill(mock, chunk())
    mock.poison([2, 3, 4, 5])
    assert prefill(mock, chunk(number=1)) == [[4]]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([chunk(blocks=(2,))], "no block for token 2"),
        ([chunk(blocks=(1, 4))], "block at page 1 of a is outside the pool"),
        ([chunk(blocks=(2, 19))], "block at page 19 of a is outside the pool"),
        ([chunk(blocks=(2, 3))], "block 3 of a is used twice"),
        ([chunk(), chunk(number=1)], "block 2 of a is used twice"),
        ([chunk(), chunk(blocks=(6, 8))], "a slot is used twice"),
        ([chunk(number=2)], "no such slot"),
        ([chunk((1,) * 9, (2, 4, 6, 8, 10))], "too many tokens"),
        ([chunk(()), chunk(number=1)], "an empty chunk"),
        ([], "too many chunks"),
        ([chunk((1, 2, 3, 4), max_new_tokens=1)], "no tokens left to generate"),
    ],
)
def test_invalid_prefills_raise(chunks: list[PrefillChunk], message: str) -> None:
    with pytest.raises(MockPoolError, match=message):
        prefill(executor(), *chunks)


def test_chunks_out_of_order_raise() -> None:
    mock = executor()
    prefill(mock, chunk((1,), (2,), params=None))
    with pytest.raises(MockPoolError, match="chunk out of order"):
        prefill(mock, chunk((3,), start=2))


def test_a_slot_of_another_request_raises() -> None:
    mock = executor()
    prefill(mock, chunk())
    with pytest.raises(MockPoolError, match="slot of another request"):
        mock.submit(Decode("a", [DecodeSequence(1, 0, (2, 4), 2, 1)], 1))


def test_more_tokens_than_the_sequence_allows_raise() -> None:
    mock = executor()
    prefill(mock, chunk())
    with pytest.raises(MockPoolError, match="too many tokens"):
        mock.submit(Decode("a", [DecodeSequence(0, 0, (2, 4, 6), 3, 1)], 2))


def test_a_decode_above_the_limit_raises() -> None:
    mock = executor()
    prefill(mock, chunk())
    with pytest.raises(MockPoolError, match="too many tokens"):
        decode(mock, 5)


def test_close_clears_the_slots() -> None:
    mock = executor()
    prefill(mock, chunk())
    mock.close()
    with pytest.raises(KeyError):
        decode(mock, 1)


def test_models_are_added_and_removed() -> None:
    mock = executor()
    assert isinstance(mock, Executor)
    assert isinstance(mock, PoisonsPages)
    mock.add_model("b", dataclasses.replace(A, name="b"))
    (tokens,) = mock.result(mock.submit(Prefill("b", [chunk()]))).tokens
    assert len(tokens) == 1
    mock.remove_model("a")
    with pytest.raises(KeyError):
        prefill(mock, chunk())
