"""Random weights: reproducibility and scale."""

from __future__ import annotations

import numpy as np

from muxjax.models.checkpoints.random_weights import open_random
from tests import golden


def test_weights_depend_on_seed_and_name_only() -> None:
    config = golden.tiny("gemma3").config
    first = dict(open_random(config, "config:gemma3", seed=3).weights())
    reopened = open_random(config, "config:gemma3", seed=3)
    for name in ("head", "embed", "layers.1.qkv"):
        if name in first:
            np.testing.assert_array_equal(reopened.source.read(name), first[name])
    other = open_random(config, "config:gemma3", seed=4)
    assert not np.array_equal(other.source.read("embed"), first["embed"])
    assert not np.array_equal(first["layers.0.qkv"], first["layers.1.qkv"])


def test_types_and_scales() -> None:
    weights = dict(open_random(golden.tiny("llama_biases").config, "x").weights())
    assert all(array.dtype == np.float32 for array in weights.values())
    np.testing.assert_array_equal(weights["layers.0.attn_norm"], np.ones(64))
    assert abs(weights["embed"].std() - 0.02) < 0.001
    assert weights["layers.0.qkv_bias"].any()


def test_tokenizer_is_the_byte_tokenizer() -> None:
    tokenizer = open_random(golden.tiny("llama").config, "x").tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("hi") == [104, 105]
    assert tokenizer.vocab_size == 128
