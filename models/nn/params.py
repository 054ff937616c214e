"""The canonical parameters: names, shapes, and how a checkpoint's tensors become them.

Every matrix is `[out, in]`, as in torch's Linear. A decoder of L layers has

    embed [V, D], final_norm [D], head [V, D] (not when tied), and for each layer
    layers.{l}.attn_norm [D]           layers.{l}.mlp_norm [D]
    layers.{l}.qkv [(N + 2K) H, D]     layers.{l}.gate_up [2F, D]
    layers.{l}.o [D, N H]              layers.{l}.down [D, F]
    layers.{l}.q_norm, k_norm [H] (qk_norm); post_attn_norm, post_mlp_norm [D] (post_norms);
    layers.{l}.qkv_bias, o_bias, gate_up_bias, down_bias where the config has them.

`qkv` holds all query heads, then all key heads, then all value heads, in the order of rows that
half rotation (pairs i, i + H/2) needs. `gate_up` holds the gate's rows, then the up projection's.
Norm weights multiply as they are (Gemma's checkpoints store them minus one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.nn.config import ModelConfig

Shape = tuple[int, ...]


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every canonical parameter of a model with its shape, in the order of the computation."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    layer: dict[str, Shape] = {"attn_norm": (D,), "qkv": (config.qkv_width, D)}
    if config.qkv_bias:
        layer["qkv_bias"] = (config.qkv_width,)
    if config.qk_norm:
        layer |= {"q_norm": (H,), "k_norm": (H,)}
    layer["o"] = (D, config.q_width)
    if config.o_bias:
        layer["o_bias"] = (D,)
    if config.post_norms:
        layer["post_attn_norm"] = (D,)
    layer |= {"mlp_norm": (D,), "gate_up": (2 * F, D)}
    if config.mlp_bias:
        layer["gate_up_bias"] = (2 * F,)
    layer["down"] = (D, F)
    if config.mlp_bias:
        layer["down_bias"] = (D,)
    if config.post_norms:
        layer["post_mlp_norm"] = (D,)
    shapes: dict[str, Shape] = {"embed": (config.vocab_size, D)}
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["final_norm"] = (D,)
    if not config.tie_embeddings:
        shapes["head"] = (config.vocab_size, D)
    return shapes


@dataclass(frozen=True)
class TensorPart:
    """One tensor of a checkpoint, and where it goes in a canonical parameter.

    Attributes:
      name: its name in the checkpoint.
      rows: how many rows of the parameter it fills.
      interleaved_heads: 0, or the number of heads whose rows it stores in interleaved order
        (pairs 2i, 2i + 1, as Meta's and llama.cpp's files have them).
      plus: added to the values (1 for Gemma's norms in Hugging Face files).
    """

    name: str
    rows: int
    interleaved_heads: int = 0
    plus: float = 0.0


Mapped = dict[str, tuple[TensorPart, ...]]
"""Canonical name -> the parts that, stacked along the rows, make it."""


def map_names(
    config: ModelConfig,
    names: Mapping[str, str],
    layer_prefix: str,
    *,
    interleaved: bool = False,
    norms_plus: float = 0.0,
) -> Mapped:
    """Works out a format's mapping from its table of names.

    Args:
      config: decides which parameters there are, and how many rows each part has.
      names: canonical name (without `layers.{l}.`) -> the checkpoint's names, separated by spaces
        where several are stacked; of layers, without their prefix.
      layer_prefix: what stands before a layer's names, with `{}` for its index.
      interleaved: whether queries and keys are stored in interleaved order.
      norms_plus: added to all norm weights.
    """
    rows = {
        "qkv": (config.q_width, config.kv_width, config.kv_width),
        "gate_up": (config.intermediate_size, config.intermediate_size),
    }
    heads = (config.num_heads, config.num_kv_heads, 0) if interleaved else (0, 0, 0)
    mapped: Mapped = {}
    for canonical, shape in param_shapes(config).items():
        prefix, short = "", canonical
        if canonical.startswith("layers."):
            _, index, short = canonical.split(".")
            prefix = layer_prefix.format(index)
        kind = short.removesuffix("_bias")
        mapped[canonical] = tuple(
            TensorPart(
                name=prefix + name,
                rows=part_rows,
                interleaved_heads=part_heads if kind == "qkv" else 0,
                plus=norms_plus if short.endswith("_norm") else 0.0,
            )
            for name, part_rows, part_heads in zip(
                names[short].split(), rows.get(kind, shape[:1]), heads, strict=False
            )
        )
    return mapped


def to_half_rotation(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head, [heads * H, ...], from interleaved pairs to halves."""
    rest = array.shape[1:]
    return array.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(array.shape)


def to_interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes `to_half_rotation`."""
    rest = array.shape[1:]
    return array.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(array.shape)


def assemble(parts: tuple[TensorPart, ...], read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Makes one canonical parameter from the checkpoint tensors that `read` returns by name."""
    arrays = []
    for part in parts:
        array = read(part.name)
        if part.interleaved_heads:
            array = to_half_rotation(array, part.interleaved_heads)
        if part.plus:
            # In float32: a bfloat16 norm weight near 1 would lose half its bits.
            array = array.astype(np.float32) + np.float32(part.plus)
        arrays.append(array)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=0)


def take_apart(
    parts: tuple[TensorPart, ...], array: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Undoes `assemble`: the checkpoint tensors, by name, of one canonical parameter."""
    start = 0
    for part in parts:
        piece = array[start : start + part.rows]
        start += part.rows
        if part.plus:
            piece = piece.astype(np.float32) - np.float32(part.plus)
        if part.interleaved_heads:
            piece = to_interleaved(piece, part.interleaved_heads)
        yield part.name, piece


def stored_shapes(config: ModelConfig, mapped: Mapped) -> dict[str, Shape]:
    """The shape that each checkpoint tensor must have."""
    shapes = param_shapes(config)
    return {
        part.name: (part.rows, *shapes[name][1:])
        for name, parts in mapped.items()
        for part in parts
    }


def check_shapes(
    origin: str,
    found: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Compares a checkpoint's tensors with those that its config asks for.

    Raises:
      CheckpointError: a tensor is missing, has another shape, or is not one of the model's (which
        would mean that the config does not describe the checkpoint).
    """
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{origin}: tensor {name} {list(shape)} is missing")
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{origin}: tensor {name} has shape {list(found[name])}, wanted {list(shape)}"
            )
    extra = [name for name in found if name not in wanted and not ignored(name)]
    if extra:
        names = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise CheckpointError(f"{origin}: tensors that this architecture does not have: {names}")
