import math

import pytest

from muxjax import SamplingParams
from muxjax.errors import InvalidRequest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", "x"),
        ("seed", 2**64),
        ("logprobs", 21),
        ("logprobs", -1),
        ("stop", [""]),
        ("stop", [3]),
        ("stop", ["x"] * 17),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", 5),
        ("ignore_eos", 1),
    ],
)
def test_invalid_values_are_rejected_with_their_field(field, value):
    with pytest.raises(InvalidRequest, match=field) as error:
        SamplingParams(**{field: value})
    assert error.value.field == field


def test_lists_and_single_strings_become_tuples():
    params = SamplingParams(stop="END", stop_token_ids=[4])
    assert (params.stop, params.stop_token_ids) == (("END",), (4,))
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_greedy_and_penalized():
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy
    assert not SamplingParams().penalized
    assert SamplingParams(presence_penalty=0.1).penalized


def test_top_k_of_minus_one_equals_zero():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0) == SamplingParams()
