"""Fleets of tiny random models, which compile fast, with different L, K and H."""

from __future__ import annotations

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 32},
    "qwen3": {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 64},
    "gemma3": {
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "sliding_window": 24,
    },
}


def entry(family: str, **keys: Any) -> dict[str, Any]:
    """A model of a fleet file, with the name of its family."""
    config = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "eos_token_id": 256,
        **SHAPES[family],
    }
    return {"name": family, "source": f"config:{family}", "config": config, **keys}


def fleet(*families: str, memory: str = "8MB", policy: str = "adbs", **engine: int) -> dict:
    """A fleet file as a dict."""
    sizes = {"max_seqs": 4, "prefill_tokens": 32, "decode_tokens": 4, **engine}
    return {
        "models": [entry(family) for family in families or SHAPES],
        "pool": {"memory": memory},
        "policy": policy,
        "engine": sizes,
    }
