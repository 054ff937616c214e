"""Makes the golden files with torch and transformers, which nothing else here needs.

    python -m tests.golden.make_goldens [tiny] [greedy] [tokenizers]

run in the checkout, in an environment with this package's dependencies and `torch`,
`transformers`, `accelerate`, `sentencepiece` (made with torch 2.13, transformers 5.23). The models
are built by transformers itself from the same files (its own GGUF reader; for stories15m a
LlamaForCausalLM filled from the .bin file here), so that the loaders are tested too.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from muxjax.models.checkpoints.hf import save_hf
from muxjax.models.checkpoints.hf_config import from_family, from_hf
from muxjax.models.checkpoints.loading import open_checkpoint
from muxjax.models.download.demo import fetch_demo
from tests.golden import DEMO_NAMES, FOLDER, params_checksum, tiny_params

OUTPUT_TOKENS = 32
MIN_MARGIN = 5e-3
"""Least difference between the best and the second logit of a greedy golden: near ties would test
rounding, not models."""

_LONG = (
    "The lighthouse keeper had lived on the island for twenty years, and in all that time he "
    "had never once failed to light the lamp at dusk. On the night of the great storm, however, "
    "the stairs were slick with rain, the wind howled through the broken window, and the oil "
    "had nearly run out. He climbed slowly, one hand on the cold stone wall, counting the steps "
    "as he always did: one hundred and ninety-nine to the top. Out at sea, a small ship with "
    "torn sails was drifting towards the rocks, and its captain was looking for the light. When "
    "the old man finally reached the lamp room, he"
)
_CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Japan?\nAnswer in one word."},
]
_CHAT_PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWrite three facts about the sea.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PROMPTS: dict[str, list[str]] = {
    "smollm2-135m": [
        "Gravity is",
        _CHAT_PROMPT,
        "def fibonacci(n):\n    ",
        "In 1969, 3 astronauts flew to the Moon. The first one to walk on it was",
        _LONG,
    ],
    "gemma3-270m": [
        "Roses are red,",
        "Once upon a time, in a village by the sea,",
        "Die Hauptstadt von Deutschland ist Berlin. Die Hauptstadt von Italien ist",
        "def fibonacci(n):\n    ",
        _LONG,
    ],
    "stories15m": [
        "Once upon a time",
        "Lily and Tom went to the park. They saw a big",
        "The little dog was",
        "One day, a girl named Sue found a red ball. She",
        (
            "Ben had a small boat. He liked to sail it on the pond near his house. One windy "
            "day the boat went too far, and Ben could not get it back. He sat on the grass and "
            "began to cry. A kind duck saw him and asked what was wrong. Ben told the duck "
            "about the boat. The duck smiled and said that she could swim very well. She jumped "
            "into the water and"
        ),
    ],
}

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces   three    four",
    "trailing ",
    "\n",
    "a\n\nb\n\n\nc",
    "\t\tx\t y\r\n",
    "1234567890 3.14159 2,718 x1y22z333",
    "1 234  567\n8",
    "I'm you're WE'LL they'd 'tis don't",
    "The quick brown fox jumps over the lazy dog.",
    "naïve café Ångström e\u0301",
    "日本語のテキストです。中文字符测试，你好！",
    "한국어 텍스트",
    "Привет, мир! مرحبا שלום हिन्दी ไทย",
    "🙂🙃 👨‍👩‍👧‍👦 🇩🇪",
    "\u00a0nbsp\u2003em \u200bzero",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "def f(x):\n    return x ** 2  # square\n",
    '{"a": [1, 2, null]}',
    "https://example.org/a?b=c&d=e#f",
    "<table><tr><td>1</td></tr></table>",
    "½ ² Ⅳ ① ﬁ 𝔘𝔫𝔦",
    "don’t “quote” — dash…",
    "ab " * 30,
]


def _tiny_configs() -> dict[str, dict[str, Any]]:
    """Family and keys of every tiny model. Windows are shorter than the tokens' number."""
    base = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    gemma = base | {
        "family": "gemma3",
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "rms_norm_eps": 1e-6,
    }
    gemma["layer_types"] = gemma["layer_types"][:4]
    qwen = base | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 1e6}
    return {
        "llama": base | {"family": "llama"},
        "llama_biases": base | {"family": "llama", "attention_bias": True, "mlp_bias": True},
        "llama_linear": base
        | {"family": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "llama3": base | {"family": "llama", "rope_theta": 5e5, "rope_scaling": llama3},
        "smollm2": base
        | {
            "family": "llama",
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_theta": 1e5,
        },
        "tinyllama": base
        | {
            "family": "llama",
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "hidden_size": 128,
        },
        "mistral": base | {"family": "mistral", "sliding_window": 8, "head_dim": 24},
        "mistral_no_window": base | {"family": "mistral", "sliding_window": None},
        "qwen2": qwen | {"family": "qwen2"},
        "qwen3": qwen | {"family": "qwen3", "head_dim": 32},
        "gemma3": gemma | {"final_logit_softcapping": 4.0},
        "gemma3_softcaps": gemma
        | {
            "final_logit_softcapping": 4.0,
            "attn_logit_softcapping": 2.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    }


def make_tiny(num_tokens: int = 24) -> None:
    """Logits of the tiny models, loaded by transformers from what `save_hf` writes."""
    described, logits = {}, {}
    for seed, (name, keys) in enumerate(_tiny_configs().items()):
        keys = dict(keys)
        config = from_family(keys.pop("family"), keys)
        params = tiny_params(config, seed)
        tokens = np.random.default_rng(seed).integers(0, config.vocab_size, num_tokens).tolist()
        with tempfile.TemporaryDirectory() as folder:
            save_hf(Path(folder), config, params)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
        written = json.loads(model.config.to_json_string(use_diff=True))
        written.pop("transformers_version", None)
        assert from_hf(written) == config, (name, from_hf(written), config)
        # transformers' Gemma 3 reads attn_logit_softcapping and does not pass it on to attention.
        options = {"softcap": config.attn_softcap} if config.attn_softcap else {}
        with torch.no_grad():
            output = model(torch.tensor([tokens]), use_cache=False, **options).logits[0]
        logits[name] = output.float().numpy()
        described[name] = {
            "seed": seed,
            "checksum": params_checksum(params),
            "tokens": tokens,
            "config": written,
        }
        print(f"{name}: logits of deviation {logits[name].std():.2f}")
    _write("tiny.json", described)
    np.savez_compressed(FOLDER / "tiny.npz", **logits)


def make_greedy() -> None:
    """Greedy tokens of the demo models in float32."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for name in DEMO_NAMES:
        tokenizer = open_checkpoint(f"demo:{name}").tokenizer
        assert tokenizer is not None
        model = _demo_model(name)
        cases[name] = []
        for text in PROMPTS[name]:
            ids = tokenizer.encode(text)
            output, margin = _greedy(model, ids)
            print(f"{name}: {len(ids)} tokens, margin {margin:.4f}: {tokenizer.decode(output)!r}")
            assert margin > MIN_MARGIN, "too near a tie: choose another prompt"
            assert not set(output) & set(tokenizer.eos_token_ids), "ends early: choose another"
            cases[name].append({"text": text, "prompt_ids": ids, "output_ids": output})
    _write("greedy.json", cases)


def _greedy(model: Any, prompt: list[int]) -> tuple[list[int], float]:
    """Greedy continuation and the least margin over the second best on the way."""
    output: list[int] = []
    margin = float("inf")
    step, cache = torch.tensor([prompt]), None
    with torch.no_grad():
        for _ in range(OUTPUT_TOKENS):
            result = model(step, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            best = result.logits[0, -1].float().topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            output.append(int(best.indices[0]))
            step = best.indices[None, :1]
    return output, margin


def _demo_model(name: str) -> Any:
    path = fetch_demo(name)
    if name == "stories15m":
        return _stories(path)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )


def _stories(path: Path) -> Any:
    """transformers' Llama with llama2.c's weights, read here without our loader."""
    header = np.fromfile(path, "<i4", 7)
    dim, hidden, layers, heads, kv_heads, vocab, length = (int(number) for number in header)
    values = torch.from_numpy(np.fromfile(path, "<f4", offset=28))
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    position = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        size = int(np.prod(shape))
        position += size
        return values[position - size : position].reshape(shape)

    def halves(matrix: torch.Tensor, count: int) -> torch.Tensor:
        return matrix.view(count, -1, 2, dim).transpose(1, 2).reshape(-1, dim)

    kv_width = dim // heads * kv_heads
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(take(vocab, dim))
        kinds = {
            "input_layernorm": (dim,),
            "self_attn.q_proj": (dim, dim),
            "self_attn.k_proj": (kv_width, dim),
            "self_attn.v_proj": (kv_width, dim),
            "self_attn.o_proj": (dim, dim),
            "post_attention_layernorm": (dim,),
            "mlp.gate_proj": (hidden, dim),
            "mlp.down_proj": (dim, hidden),
            "mlp.up_proj": (hidden, dim),
        }
        for kind, shape in kinds.items():
            for layer in model.model.layers:
                weight = take(*shape)
                if kind == "self_attn.q_proj":
                    weight = halves(weight, heads)
                elif kind == "self_attn.k_proj":
                    weight = halves(weight, kv_heads)
                layer.get_submodule(kind).weight.copy_(weight)
        model.model.norm.weight.copy_(take(dim))
    return model


def make_tokenizers() -> None:
    """Token ids by transformers' tokenizers, and the chat prompt of SmolLM2."""
    cases: dict[str, list[tuple[str, list[int]]]] = {}
    for name in ("smollm2-135m", "gemma3-270m"):
        path = fetch_demo(name)
        reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if name == "smollm2-135m":
            # Reading GGUF, transformers takes GPT-2's splitting; SmolLM2's own tokenizer.json has:
            reference.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
                [
                    tokenizers.pre_tokenizers.Digits(individual_digits=True),
                    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
            prompt = reference.apply_chat_template(
                _CHAT, tokenize=False, add_generation_prompt=True
            )
        cases[name] = [(text, reference(text)["input_ids"]) for text in TEXTS]
    _write("tokenizers.json", {"texts": cases, "chat": {"messages": _CHAT, "prompt": prompt}})


def _write(name: str, content: Any) -> None:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    (FOLDER / name).write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    torch.set_num_threads(2)
    steps = {"tiny": make_tiny, "greedy": make_greedy, "tokenizers": make_tokenizers}
    for step in sys.argv[1:] or steps:
        steps[step]()
