"""The canonical parameters: names, shapes, and the mapping from a checkpoint's tensors.

Every matrix is `[out, in]`, as in torch's Linear. A decoder of L layers has

    embed [V, D], final_norm [D], head [V, D] (not when tied), and for each layer
    layers.{l}.attn_norm [D]           layers.{l}.mlp_norm [D]
    layers.{l}.qkv [(N + 2K) H, D]     layers.{l}.gate_up [2F, D]
    layers.{l}.o [D, N H]              layers.{l}.down [D, F]
    layers.{l}.q_norm, k_norm [H] (qk_norm); post_attn_norm, post_mlp_norm [D] (post_norms);
    layers.{l}.qkv_bias, o_bias, gate_up_bias, down_bias where the config has them.

`qkv` holds all query heads, then all key heads, then all value heads. The rows of a head are in the
order of half rotation (pairs i, i + H/2). `gate_up` holds the rows of the gate projection, then of
the up projection. Norm weights are multipliers (Gemma's safetensors store them minus one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.nn.config import ModelConfig

Shape = tuple[int, ...]


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Canonical parameters of a model and their shapes, in the order of computation."""
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
    """A tensor of a checkpoint that provides some rows of a canonical parameter.

    Attributes:
      name: its name in the checkpoint.
      rows: number of the parameter's rows that the tensor provides.
      interleaved_heads: 0, or the number of heads whose rows are stored in interleaved order (pairs
        2i, 2i + 1, as in Meta's and llama.cpp's files).
      offset: added to the values (1 for Gemma's norms in Hugging Face files).
    """

    name: str
    rows: int
    interleaved_heads: int = 0
    offset: float = 0.0


ParamMapping = dict[str, tuple[TensorPart, ...]]
"""Canonical name -> the parts whose concatenation along the rows is the parameter."""


def map_names(
    config: ModelConfig,
    names: Mapping[str, str],
    layer_prefix: str,
    *,
    interleaved: bool = False,
    norm_offset: float = 0.0,
) -> ParamMapping:
    """Builds a format's mapping from its table of names.

    Args:
      config: determines the parameters and the number of rows of each part.
      names: canonical name (without `layers.{l}.`) -> the checkpoint's names (without
        `layer_prefix`). Spaces separate names whose tensors are concatenated.
      layer_prefix: prefix of a layer's names, with `{}` for its index.
      interleaved: whether queries and keys are stored in interleaved order.
      norm_offset: added to all norm weights.
    """
    rows = {
        "qkv": (config.q_width, config.kv_width, config.kv_width),
        "gate_up": (config.intermediate_size, config.intermediate_size),
    }
    heads = (config.num_heads, config.num_kv_heads, 0) if interleaved else (0, 0, 0)
    mapped: ParamMapping = {}
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
                offset=norm_offset if short.endswith("_norm") else 0.0,
            )
            for name, part_rows, part_heads in zip(
                names[short].split(), rows.get(kind, shape[:1]), heads, strict=False
            )
        )
    return mapped


def to_half_rotation(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head, `[heads * H, ...]`, from interleaved to half rotation."""
    rest = array.shape[1:]
    return array.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(array.shape)


def to_interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `to_half_rotation`."""
    rest = array.shape[1:]
    return array.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(array.shape)


def assemble_param(parts: tuple[TensorPart, ...], read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Builds a canonical parameter from the checkpoint tensors that `read` returns by name."""
    arrays = []
    for part in parts:
        array = read(part.name)
        if part.interleaved_heads:
            array = to_half_rotation(array, part.interleaved_heads)
        if part.offset:
            # In float32: a bfloat16 norm weight near 1 would lose half its bits.
            array = array.astype(np.float32) + np.float32(part.offset)
        arrays.append(array)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=0)


def split_param(
    parts: tuple[TensorPart, ...], array: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `assemble_param`: name and array of each checkpoint tensor of a parameter."""
    start = 0
    for part in parts:
        tensor = array[start : start + part.rows]
        start += part.rows
        if part.offset:
            tensor = tensor.astype(np.float32) - np.float32(part.offset)
        if part.interleaved_heads:
            tensor = to_interleaved(tensor, part.interleaved_heads)
        yield part.name, tensor


def stored_shapes(config: ModelConfig, mapped: ParamMapping) -> dict[str, Shape]:
    """The expected shape of each checkpoint tensor."""
    shapes = param_shapes(config)
    return {
        part.name: (part.rows, *shapes[name][1:])
        for name, parts in mapped.items()
        for part in parts
    }


def check_shapes(
    origin: str,
    actual: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Compares a checkpoint's tensors with those that its config requires.

    Args:
      origin: the checkpoint's source, for messages.
      actual: shapes of the checkpoint's tensors.
      expected: shapes of the required tensors.
      ignored: whether a tensor outside `expected` may be present.

    Raises:
      CheckpointError: a tensor is missing, has another shape, or is unknown.
    """
    for name, shape in expected.items():
        if name not in actual:
            raise CheckpointError(f"{origin}: tensor {name} {list(shape)} is missing")
        if tuple(actual[name]) != shape:
            raise CheckpointError(
                f"{origin}: tensor {name} has shape {list(actual[name])}, expected {list(shape)}"
            )
    extra = [name for name in actual if name not in expected and not ignored(name)]
    if extra:
        names = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise CheckpointError(f"{origin}: tensors that this architecture does not have: {names}")
