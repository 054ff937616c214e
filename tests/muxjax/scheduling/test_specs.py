from __future__ import annotations

import pytest

from muxjax.scheduling.specs import BucketLimits, LatencySlo, ModelSpec


def test_blocks_for_rounds_up() -> None:
    spec = ModelSpec("a", 2, 4, 64)
    assert [spec.blocks_for(tokens) for tokens in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"tokens_per_page": 0}, "tokens_per_page"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"kv_floor": 1.5}, "kv_floor"),
    ],
)
def test_bad_specs_are_refused(fields: dict[str, float], message: str) -> None:
    good = {"name": "a", "num_layers": 2, "tokens_per_page": 4, "max_model_len": 64}
    with pytest.raises(ValueError, match=message):
        ModelSpec(**{**good, **fields})


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_decode_tokens"):
        BucketLimits(max_decode_tokens=0)


def test_a_slo_is_met_within_its_explicit_targets() -> None:
    slo = LatencySlo(ttft=0.5, tpot=0.1)
    assert slo.met_by(0.5, 0.1)
    assert slo.met_by(0.5, None)
    assert not slo.met_by(0.6, 0.1)
    assert not slo.met_by(0.5, 0.2)
    assert LatencySlo(scale=1.0).met_by(100.0, 100.0)
