"""config.json in its older and newer forms, and unsupported options."""

from __future__ import annotations

import math
from typing import Any

import pytest

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.hf_config import from_family, from_hf, to_hf
from muxjax.models.nn.config import FAMILIES, RopeConfig
from tests import golden

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("name", golden.tiny_names())
def test_to_hf_and_transformers_write_equivalent_configs(name: str) -> None:
    """`transformers` writes `rope_parameters`; `to_hf` writes `rope_theta` and `rope_scaling`."""
    config = golden.tiny(name).config
    written = to_hf(config)
    assert "rope_parameters" in golden.tiny(name).hf_config
    assert "rope_theta" in written
    assert from_hf(written) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_defaults_for_every_key(family: str) -> None:
    config = from_family(family, {})
    assert config.family == family
    assert from_hf(to_hf(config)) == config


def test_defaults_of_gemma3() -> None:
    config = from_family("gemma3", SMALL)
    assert config.head_dim == 256
    assert config.tie_embeddings
    assert config.activation == "gelu_tanh"
    assert config.embed_scale == 8.0
    assert config.attn_scale == 256**-0.5
    assert config.rope == RopeConfig(1_000_000.0)
    assert config.local_rope == RopeConfig(10_000.0)
    assert config.sliding_window == 4096
    assert config.layer_is_sliding == (True, True, True, True, True, False, True, True)
    assert config.qk_norm
    assert config.post_norms
    assert from_family("gemma3", SMALL | {"sliding_window_pattern": 2}).layer_is_sliding == (
        (True, False) * 4
    )


def test_num_kv_heads_defaults_to_query_heads_for_llama_only() -> None:
    keys = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    assert from_family("llama", keys).num_kv_heads == 4
    with pytest.raises(CheckpointError, match="cannot share"):
        from_family("mistral", keys)  # transformers assumes 8


def test_config_of_gemma_image_models_is_their_text_config() -> None:
    config = from_hf(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "text_config": SMALL | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
            "vision_config": {"hidden_size": 1152},
        }
    )
    assert config.hidden_size == 64
    assert config.rope == RopeConfig(1_000_000.0, "linear", 8.0)
    assert config.local_rope == RopeConfig(10_000.0)
    assert config.eos_token_ids == (1, 106)


def test_end_tokens_of_generation_config_are_added() -> None:
    mapping = SMALL | {"architectures": ["LlamaForCausalLM"], "eos_token_id": 2}
    assert from_hf(mapping, {"eos_token_id": [7, 2]}).eos_token_ids == (2, 7)
    assert from_hf(mapping | {"eos_token_id": None}).eos_token_ids == ()


def test_qwen_windows_need_use_sliding_window() -> None:
    keys = SMALL | {"sliding_window": 16, "max_window_layers": 6}
    assert from_family("qwen2", keys).sliding_window is None
    config = from_family("qwen2", keys | {"use_sliding_window": True})
    assert config.layer_is_sliding == (False,) * 6 + (True,) * 2
    assert from_hf(to_hf(config)) == config


def test_mistral_windows() -> None:
    assert from_family("mistral", SMALL).layer_is_sliding == (True,) * 8
    unwindowed = from_family("mistral", SMALL | {"sliding_window": None})
    assert unwindowed.layer_is_sliding == (False,) * 8


def test_old_key_of_the_scaling_type() -> None:
    config = from_family("llama", SMALL | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert config.rope == RopeConfig(10000.0, "linear", 2.0)


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "'yarn' is not supported",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "needs low_freq_factor",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ("gemma3", {"hidden_activation": "gelu"}, "activation 'gelu' is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen3", {"layer_types": ["linear_attention"] * 8}, "linear_attention"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_size": "64"}, "wrong type"),
        ("llama", {"num_attention_heads": 0}, "wrong type"),
        ("llama", {"rms_norm_eps": None}, "wrong type"),
        ("gpt2", {}, "unknown family 'gpt2'; known: llama, mistral"),
    ],
)
def test_unsupported_options_are_rejected(family: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_family(family, SMALL | keys)


def test_unknown_architecture_is_named_in_the_error() -> None:
    with pytest.raises(
        CheckpointError, match=r"unknown architecture \(MambaForCausalLM\); known: L"
    ):
        from_hf({"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    with pytest.raises(CheckpointError, match=r"unknown architecture \(t5\)"):
        from_hf({"model_type": "t5"})


def test_config_that_hf_cannot_express_is_rejected() -> None:
    config = from_family("llama", SMALL)
    rope = RopeConfig(1e4, "divisors", divisors=(1.0,) * 8)
    with pytest.raises(CheckpointError, match="cannot be expressed"):
        to_hf(type(config)(**(vars(config) | {"rope": rope})))
    with pytest.raises(CheckpointError, match="cannot express"):
        to_hf(type(config)(**(vars(config) | {"attn_scale": math.pi})))
