"""What `transformers` gives, kept in small files, and the weights that it was given.

`make_goldens.py` makes the files (it needs torch and transformers); this module reads them, and
makes the tiny models' weights again, with numpy only.

    greedy.json      per demo model: prompts, their token ids, 32 greedy tokens in float32
    tokenizers.json  per demo model: texts and their token ids; a conversation and its prompt
    tiny.json        per tiny model: config.json as transformers writes it, seed, tokens
    tiny.npz         per tiny model: logits [T, V] in float32
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muxjax.models.checkpoints.hf_config import from_hf
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import param_shapes

FOLDER = Path(__file__).parent
DEMO_NAMES = ("smollm2-135m", "gemma3-270m", "stories15m")


@dataclass(frozen=True)
class Greedy:
    """One prompt of a demo model and what follows it, greedily, in float32."""

    text: str
    prompt_ids: list[int]
    output_ids: list[int]


@dataclass(frozen=True)
class Tiny:
    """A tiny model with random weights, some tokens, and the logits after each of them.

    Attributes:
      name: family and what is special about it.
      hf_config: config.json as transformers writes it.
      config: the same, read by us.
      params: canonical parameters in float32.
      tokens: T token ids.
      logits: [T, V], by transformers in float32.
    """

    name: str
    hf_config: dict[str, Any]
    config: ModelConfig
    params: dict[str, np.ndarray]
    tokens: list[int]
    logits: np.ndarray


def greedy(name: str) -> list[Greedy]:
    """The greedy outputs of a demo model."""
    return [Greedy(**case) for case in _read("greedy.json")[name]]


def tokenizer_cases(name: str) -> list[tuple[str, list[int]]]:
    """Texts and their token ids, begin token included where the model has one."""
    return [(text, ids) for text, ids in _read("tokenizers.json")["texts"][name]]


def chat_case() -> tuple[list[dict[str, str]], str]:
    """A conversation, and the prompt that SmolLM2's template makes of it."""
    chat = _read("tokenizers.json")["chat"]
    return chat["messages"], chat["prompt"]


def tiny_names() -> list[str]:
    """All tiny models."""
    return list(_read("tiny.json"))


def tiny(name: str) -> Tiny:
    """One tiny model with its weights and logits."""
    case = _read("tiny.json")[name]
    config = from_hf(case["config"])
    params = tiny_params(config, case["seed"])
    found = params_checksum(params)
    assert found == case["checksum"], (
        f"numpy's random numbers have changed ({found}): make the goldens again"
    )
    with np.load(FOLDER / "tiny.npz") as logits:
        return Tiny(name, case["config"], config, params, case["tokens"], logits[name])


def tiny_params(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Random weights for which every part of the model matters.

    Norms are spread around one, biases are not small, and matrices keep the size of what they
    multiply, so that a wrong norm, bias, rotation or window changes the logits by far more than
    rounding.
    """
    return {name: _tiny_tensor(name, shape, seed) for name, shape in param_shapes(config).items()}


def _tiny_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = random.standard_normal(shape)
    if name.endswith("_norm"):
        values = 1 + 0.2 * values
    elif name.endswith("_bias") or name in ("embed", "head"):
        values = 0.3 * values
    else:
        values = values / np.sqrt(shape[-1])
    return values.astype(np.float32)


def params_checksum(params: dict[str, np.ndarray]) -> int:
    """A number that changes with any bit of the parameters."""
    checksum = 0
    for array in params.values():
        checksum = zlib.crc32(np.ascontiguousarray(array).tobytes(), checksum)
    return checksum


def _read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text("utf-8"))
