from __future__ import annotations

from muxjax.scheduling.requests import Request


def test_tokens_between_reads_on_from_prompt_to_output() -> None:
    request = Request(0, "a", [1, 2, 3])
    request.output = [4, 5]
    assert request.num_tokens == 5
    assert request.tokens_between(0, 5) == (1, 2, 3, 4, 5)
    assert request.tokens_between(1, 2) == (2,)
    assert request.tokens_between(2, 4) == (3, 4)
    assert request.tokens_between(3, 5) == (4, 5)
    assert request.tokens_between(4, 5) == (5,)


def test_expected_tokens_count_what_is_in_flight() -> None:
    request = Request(0, "a", [1, 2, 3])
    request.output = [4]
    request.pending = 3
    assert request.expected_tokens == 4
