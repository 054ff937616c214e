from __future__ import annotations

from dataclasses import replace

import pytest

from muxjax.placement.costs.model_shape import LLAMA_SHAPES, ModelShape

LLAMA3_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, small_params=65 * 4096)


def test_parameter_counts_match_the_released_models() -> None:
    # Parameter counts of the checkpoints on the Hugging Face Hub.
    assert LLAMA_SHAPES["llama-7b"].num_params == 6_738_415_616
    assert LLAMA_SHAPES["llama-13b"].num_params == 13_015_864_320
    assert LLAMA_SHAPES["llama-65b"].num_params == 65_285_660_672
    assert LLAMA3_8B.num_params == 8_030_261_248


def test_kv_bytes_depend_on_the_kv_heads() -> None:
    assert LLAMA_SHAPES["llama-7b"].kv_bytes_per_token() == 2 * 32 * 4096 * 2
    assert LLAMA3_8B.kv_bytes_per_token() == 2 * 32 * 8 * 128 * 2
    assert LLAMA3_8B.kv_bytes_per_token(4) == 2 * 32 * 2 * 128 * 2


def test_kv_heads_are_replicated_on_more_devices() -> None:
    assert LLAMA3_8B.kv_bytes_per_token(16) == LLAMA3_8B.kv_bytes_per_token(8)
    # Their projections are replicated too.
    doubled = 2 * 32 * 4096 * 0.5 * 128 * 2
    halved = (LLAMA3_8B.weight_bytes(8) - 4 * LLAMA3_8B.small_params) / 2
    assert LLAMA3_8B.weight_bytes(16) - 4 * LLAMA3_8B.small_params == halved + doubled


def test_tied_embeddings_are_counted_once() -> None:
    tied = replace(LLAMA3_8B, tie_embeddings=True)
    assert LLAMA3_8B.weight_bytes() - tied.weight_bytes() == 2 * 128256 * 4096


def test_quantized_weights_use_fewer_bytes() -> None:
    quantized = replace(LLAMA3_8B, weight_bits=4.5)
    tables = 2 * 128256 * 4096 * 2
    assert quantized.weight_bytes() == pytest.approx(
        LLAMA3_8B.layer_params * 4.5 / 8 + tables + 4 * 65 * 4096
    )


def test_tp_sizes_divide_the_heads() -> None:
    assert [tp for tp in (1, 2, 4, 8) if LLAMA_SHAPES["llama-30b"].supports_tp(tp)] == [1, 2, 4]
    assert [tp for tp in (1, 2, 4, 8, 16, 32, 64) if LLAMA3_8B.supports_tp(tp)] == [
        1, 2, 4, 8, 16, 32,
    ]  # fmt: skip


def test_invalid_sizes_raise() -> None:
    with pytest.raises(ValueError, match="hidden_size must be at least 1, not 0"):
        replace(LLAMA3_8B, hidden_size=0)
    with pytest.raises(ValueError, match=r"must be a multiple of num_kv_heads \(5\)"):
        replace(LLAMA3_8B, num_kv_heads=5)
    with pytest.raises(ValueError, match="weight_bits"):
        replace(LLAMA3_8B, weight_bits=float("nan"))
