"""Writes llama2.c's model files for tests."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from tests import golden
from tests.models.gguf_files import hf_tensors, llama_cpp_order

KINDS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)


def write_model(path: Path, name: str) -> None:
    """Writes a tiny model in the order of llama2.c's `legacy_export`."""
    case = golden.tiny(name)
    c = case.config
    tensors = hf_tensors(c, case.params)
    vocab = c.vocab_size if c.tie_embeddings else -c.vocab_size
    numbers = (c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads)
    with path.open("wb") as file:
        file.write(struct.pack("<7i", *numbers, vocab, 32))
        file.write(tensors["model.embed_tokens.weight"].tobytes())
        for kind in KINDS:
            for layer in range(c.num_layers):
                array = tensors[f"model.layers.{layer}.{kind}.weight"]
                if kind.endswith(("q_proj", "k_proj")):
                    heads = c.num_heads if kind.endswith("q_proj") else c.num_kv_heads
                    array = llama_cpp_order(array, heads)
                file.write(np.ascontiguousarray(array).tobytes())
        file.write(tensors["model.norm.weight"].tobytes())
        file.write(np.zeros((2, 32, c.head_dim // 2), np.float32).tobytes())
        if not c.tie_embeddings:
            file.write(tensors["lm_head.weight"].tobytes())
