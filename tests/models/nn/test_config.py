"""Rotary frequencies and the checks of a config."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from muxjax.errors import CheckpointError
from muxjax.models.nn.config import ModelConfig, RopeConfig, rope_frequencies


def small(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 128,
        "num_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position": 256,
    }
    return ModelConfig(**(values | changes))


def test_frequencies_are_a_geometric_series() -> None:
    frequencies = rope_frequencies(RopeConfig(theta=10000.0), 8)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-6)


def test_linear_scaling_divides_all_frequencies() -> None:
    scaled = rope_frequencies(RopeConfig(10000.0, "linear", factor=4.0), 8)
    np.testing.assert_allclose(scaled, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)


def test_divisors_apply_per_pair() -> None:
    rope = RopeConfig(10000.0, "divisors", divisors=(1.0, 2.0, 4.0, 8.0))
    np.testing.assert_allclose(rope_frequencies(rope, 8), [1, 0.05, 0.0025, 0.000125], rtol=1e-6)
    with pytest.raises(CheckpointError, match="rope needs 8 divisors for a head of 16, not 4"):
        rope_frequencies(rope, 16)


def test_llama3_scaling_divides_low_frequencies_only() -> None:
    rope = RopeConfig(
        500000.0,
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )
    plain = rope_frequencies(RopeConfig(500000.0), 128)
    scaled = rope_frequencies(rope, 128)
    turns = 8192 * plain / (2 * math.pi)
    np.testing.assert_array_equal(scaled[turns > 4.001], plain[turns > 4.001])
    np.testing.assert_allclose(scaled[turns < 0.999], plain[turns < 0.999] / 8, rtol=1e-6)
    between = (turns < 4) & (turns > 1)
    assert between.any()
    kept = (turns[between] - 1) / 3
    wanted = kept * plain[between] + (1 - kept) * plain[between] / 8
    np.testing.assert_allclose(scaled[between], wanted, rtol=1e-5)


def test_derived_sizes_and_defaults() -> None:
    config = small()
    assert (config.q_width, config.kv_width, config.qkv_width) == (64, 32, 128)
    assert config.attn_scale == 0.25
    assert config.layer_is_sliding == (False, False)
    assert hash(config) == hash(small())


def test_windows_and_rope_per_layer() -> None:
    local = RopeConfig(5.0)
    config = small(sliding_window=8, layer_is_sliding=(True, False), local_rope=local)
    assert (config.layer_window(0), config.layer_window(1)) == (8, None)
    assert (config.layer_rope(0), config.layer_rope(1)) == (local, config.rope)
    without_local = dataclasses.replace(config, local_rope=None)
    assert without_local.layer_rope(0) == config.rope


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a positive whole number, not 0"),
        ({"num_kv_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 15}, "must be even"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"layer_is_sliding": (True,)}, "1 layer types for 2 layers"),
        ({"layer_is_sliding": (True, False)}, "positive sliding_window, not None"),
    ],
)
def test_invalid_config_is_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    "rope",
    [
        {"theta": 0.0},
        {"theta": math.inf},
        {"scaling": "linear", "factor": -1.0},
        {"scaling": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0},
    ],
)
def test_invalid_rope_is_rejected(rope: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        RopeConfig(**rope)
