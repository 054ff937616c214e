from __future__ import annotations

import math

import pytest

from muxjax.scheduling.expected_load import ExpectedLoad


def test_tokens_of_a_request() -> None:
    load = ExpectedLoad(2.0, 100.0, 50.0)
    assert load.request_tokens == 150.0
    assert load.decode_context == 125.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": -1.0}, "rate must be a finite number of requests per second"),
        ({"rate": math.nan}, "rate"),
        ({"prompt_tokens": -0.5}, "prompt_tokens must be a finite number of tokens"),
        ({"output_tokens": math.inf}, "output_tokens"),
    ],
)
def test_invalid_values_are_rejected(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpectedLoad(**fields)
