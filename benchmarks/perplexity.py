"""Perplexity of each precision on a bundled text.

    python benchmarks/perplexity.py
    python benchmarks/perplexity.py --model demo:gemma3-270m --precision int8 --json

The text (data/README.md) is split into pieces that fit the model's context, each after the begin
token if the model has one. Matrix products are as in the compiled steps, and attention is within a
piece. For all precisions but float32, keys and values are rounded to bfloat16, as in the pool.
`loss` is the increase in perplexity relative to float32, and `+-` its standard error over the
tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from muxjax.bench.machine import describe_machine
from muxjax.bench.script_output import print_json, print_table
from muxjax.bench.single_model import PRECISIONS, Precision
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.checkpoints.loading import open_checkpoint
from muxjax.models.nn.attention import DenseAttend
from muxjax.models.nn.decoder import Decoder
from muxjax.models.nn.weight_format import put_on_device, stored_bytes
from muxjax.pallas_kernels import AttentionOptions
from muxjax.progress import Bars

TEXT = Path(__file__).parent / "data" / "wells.txt"
MODELS = ("demo:smollm2-135m", "demo:gemma3-270m")
PIECE = 256
"""Tokens of a piece: 256 rows of logits are 268 MB with Gemma's vocabulary."""


def main() -> None:
    """Measures all precisions and prints the result."""
    parser = argparse.ArgumentParser(description="Measure perplexity by precision.")
    parser.add_argument("--model", action="append", help="a source; default: both demo models")
    parser.add_argument(
        "--precision", action="append", choices=list(PRECISIONS), help="default: all"
    )
    parser.add_argument("--text", type=Path, default=TEXT, help="a file of text in UTF-8")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    precisions = dict.fromkeys(["float32", *(arguments.precision or PRECISIONS)])
    text = arguments.text.read_text("utf-8")
    models = arguments.model or MODELS
    rows: list[dict[str, Any]] = []
    with Bars({"measuring": len(models) * len(precisions)}, show=True) as bars:
        for model in models:
            checkpoint = open_checkpoint(model)
            if checkpoint.tokenizer is None:
                parser.error(f"{model} has no tokenizer")
            pieces = split_pieces(
                checkpoint.tokenizer.encode(text, False), checkpoint.config.bos_token_id
            )
            if not len(pieces):
                parser.error(f"{arguments.text} has fewer than {PIECE} tokens of {model}")
            exact: np.ndarray | None = None
            for name in precisions:
                losses = measure(checkpoint, PRECISIONS[name], pieces)
                exact = losses if exact is None else exact
                rows.append(row(model, name, checkpoint, losses, exact))
                bars.advance("measuring", 1, f"{model} {name}")
    if arguments.json:
        print_json({"text": arguments.text.name, **describe_machine(), "rows": rows})
        return
    print_table(f"perplexity, {arguments.text.name}", tuple(rows[0]), rows, JAX=jax.__version__)


def split_pieces(ids: Sequence[int], bos: int | None) -> np.ndarray:
    """Splits the text into full pieces `[pieces, PIECE]`, each after the begin token."""
    first = [] if bos is None else [bos]
    length = PIECE - len(first)
    count = len(ids) // length
    return np.array([[*first, *ids[i * length : (i + 1) * length]] for i in range(count)], np.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HalfPool(DenseAttend):
    """Attention over keys and values rounded to bfloat16, as in a bfloat16 pool."""

    def __call__(
        self,
        cache: None,
        layer: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        options: AttentionOptions,
    ) -> tuple[jax.Array, None]:
        """See `Attend`."""
        k, v = (x.astype(jnp.bfloat16).astype(x.dtype) for x in (k, v))
        return DenseAttend.__call__(self, cache, layer, q, k, v, options)


def measure(checkpoint: Checkpoint, precision: Precision, pieces: np.ndarray) -> np.ndarray:
    """Returns the negative log-probability of each token but the first of each piece."""
    weights: dict[str, Any] = {}
    for name, array in checkpoint.weights():
        arrays = put_on_device(
            checkpoint.config, name, array, precision.dtype, precision.quantization
        )
        weights.update(arrays)
    graph, state = nnx.split(Decoder(checkpoint.config, weights))
    exact = precision == PRECISIONS["float32"]
    attend = DenseAttend(PIECE) if exact else HalfPool(PIECE)

    @jax.jit
    def losses(state: Any, tokens: jax.Array) -> jax.Array:
        decoder = nnx.merge(graph, state)
        hidden, _ = decoder(tokens, jnp.arange(PIECE), None, attend)
        logits = decoder.logits(hidden)[:-1]
        chosen = jnp.take_along_axis(logits, tokens[1:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen

    return np.concatenate([losses(state, piece) for piece in pieces])


def row(
    model: str, precision: str, checkpoint: Checkpoint, losses: np.ndarray, exact: np.ndarray
) -> dict[str, Any]:
    """Builds a row of the table."""
    kind = PRECISIONS[precision]
    increase = losses - exact
    return {
        "model": model,
        "precision": precision,
        "weights_MB": stored_bytes(checkpoint.config, kind.dtype, kind.quantization) / 1e6,
        "tokens": len(losses),
        "perplexity": float(np.exp(losses.mean())),
        "loss_%": float(100 * np.expm1(increase.mean())),
        "+-": float(100 * increase.std() / len(increase) ** 0.5),
    }


if __name__ == "__main__":
    main()
