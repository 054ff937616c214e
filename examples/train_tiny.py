"""Trains three tiny decoders of different shapes on sonnets and saves them for serving.

    python examples/train_tiny.py
    muxjax generate examples/tiny/fleet.yaml --model llama --prompt "Shall I compare thee"

A Llama, a Qwen 3 and a Gemma 3 with different numbers of layers, KV heads and head sizes read text
as bytes and are trained until they have memorized it. A wrong cache page then changes the output
visibly. Each is saved twice, as an Orbax checkpoint and as a
Hugging Face folder with safetensors, beside a fleet file that serves all three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from muxjax.models.checkpoints import orbax
from muxjax.models.checkpoints.hf import save_hf
from muxjax.models.checkpoints.hf_config import from_family
from muxjax.models.nn.config import Family, ModelConfig
from muxjax.models.nn.decoder import Decoder
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from muxjax.progress import Bars

HERE = Path(__file__).resolve().parent
VOCAB = 256
"""Vocabulary size: tokens are bytes."""

# The models differ in L, K and H, and in R (pool rows per token and layer: 1, 2 and 3).
SHAPES: dict[Family, dict[str, Any]] = {
    "llama": {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "qwen3": {
        "num_hidden_layers": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "gemma3": {
        "num_hidden_layers": 6,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
        "sliding_window_pattern": 3,  # two sliding layers, then a full one
    },
}


@dataclass(frozen=True)
class Recipe:
    """Settings of the training.

    Attributes:
      steps: optimizer steps.
      batch, length: sequences per step, and tokens per sequence.
      rate: peak learning rate, reached after a tenth of the steps and followed by cosine decay.
      text_bytes: number of bytes of the text that are used.
    """

    steps: int = 750
    batch: int = 2
    length: int = 160
    rate: float = 2e-3
    text_bytes: int | None = None


QUICK = Recipe(steps=250, text_bytes=634)
"""The first sonnet only, in less than half of the time; used in tests."""


def tiny_config(family: Family) -> ModelConfig:
    """The config of one of the three models."""
    common = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return from_family(family, common | SHAPES[family])


def next_byte_loss(decoder: Decoder, pieces: Int[Array, "B length"]) -> Float[Array, ""]:
    """Mean cross-entropy, in nats, of each byte after the first, given the preceding bytes."""
    logits = decoder.dense_logits(pieces[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, pieces[:, 1:])
    return losses.mean()


@nnx.jit
def train_step(
    decoder: Decoder, optimizer: nnx.Optimizer, pieces: Int[Array, "B length"]
) -> Float[Array, ""]:
    """Runs one optimizer step, which updates the decoder in place; returns the loss before it."""
    loss, gradients = nnx.value_and_grad(next_byte_loss)(decoder, pieces)
    optimizer.update(decoder, gradients)
    return loss


def train(
    config: ModelConfig,
    text: bytes,
    recipe: Recipe,
    seed: int,
    stepped: Callable[[float], None],
) -> Decoder:
    """Trains a decoder from random weights. The same seed gives the same decoder.

    Args:
      config: shape of the decoder.
      text: the training text.
      recipe: settings of the training.
      seed: seed of the initial weights and of the order of the pieces.
      stepped: called with the loss after each step.
    """
    tokens = np.frombuffer(text, np.uint8)[: recipe.text_bytes].astype(np.int32)
    decoder = Decoder.init(config, nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=recipe.rate,
        warmup_steps=recipe.steps // 10,
        decay_steps=recipe.steps,
        end_value=recipe.rate / 20,
    )
    optimizer = nnx.Optimizer(
        decoder,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99)),
        wrt=nnx.Param,
    )
    # Sequences start at the beginning of a line, as prompts do.
    lines = np.flatnonzero(np.append(ord("\n"), tokens[:-1]) == ord("\n"))
    random = np.random.default_rng(seed)
    offsets = np.arange(recipe.length + 1)
    for _ in range(recipe.steps):
        starts = random.choice(lines, recipe.batch)
        # The text wraps around, so that every line is seen equally often.
        pieces = tokens[(starts[:, None] + offsets) % len(tokens)]
        stepped(float(train_step(decoder, optimizer, pieces)))
    return decoder


def save(decoder: Decoder, folder: Path) -> None:
    """Writes `folder/orbax` and `folder/safetensors`."""
    weights, tokenizer = decoder.weights(), byte_tokenizer(VOCAB)
    orbax.save(folder / "orbax", decoder.config, weights, tokenizer)
    save_hf(folder / "safetensors", decoder.config, weights, tokenizer)


def write_fleet_file(folder: Path) -> Path:
    """Writes the fleet file of the three models."""
    lines = [
        "# Written by examples/train_tiny.py. Each model has also a `safetensors` folder.",
        "models:",
    ]
    for family in SHAPES:
        lines += [f"  - name: {family}", f"    source: ./{family}/orbax"]
    lines += ["pool:", "  memory: 32MB"]
    path = folder / "fleet.yaml"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def main() -> None:
    """Trains and saves all three."""
    parser = argparse.ArgumentParser(description="Train three tiny models and save them.")
    parser.add_argument("--output", type=Path, default=HERE / "tiny", help="folder to write")
    parser.add_argument("--text", type=Path, default=HERE / "data" / "sonnets.txt")
    parser.add_argument("--quick", action="store_true", help="the first sonnet only, for tests")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    recipe = QUICK if arguments.quick else Recipe()
    text = arguments.text.read_bytes()
    if len(text) <= recipe.length:
        parser.error(f"{arguments.text} must have more than {recipe.length} bytes")

    began = time.perf_counter()
    summary = []
    with Bars(dict.fromkeys(SHAPES, recipe.steps), show=True) as bars:
        for family in SHAPES:
            losses: list[float] = []

            def stepped(loss: float, family: Family = family, losses: list[float] = losses) -> None:
                losses.append(loss)
                bars.advance(family, 1, f"loss {loss:.2f}")

            decoder = train(tiny_config(family), text, recipe, arguments.seed, stepped)
            save(decoder, arguments.output / family)
            size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder)))
            loss = float(np.mean(losses[-10:]))
            summary.append(f"{family}: {size:,} parameters, loss {losses[0]:.2f} -> {loss:.2f}")
    fleet_file = write_fleet_file(arguments.output)
    print("\n".join(summary))
    print(f"{fleet_file} written after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
