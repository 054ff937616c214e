"""Checkpoints in Hugging Face's format: a folder with config.json and safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.checkpoint import Checkpoint, Wait
from muxjax.models.checkpoints.hf_config import from_hf, to_hf
from muxjax.models.checkpoints.source_files import SourceFiles
from muxjax.models.json_files import read_json
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import ParamMapping, Shape, map_names, param_shapes, split_param
from muxjax.models.tokenizers.hf_tokenizer import read_tokenizer
from muxjax.models.tokenizers.tokenizer import Tokenizer

_LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "qkv": "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
    "qkv_bias": "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "o_bias": "self_attn.o_proj.bias",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate_up": "mlp.gate_proj.weight mlp.up_proj.weight",
    "gate_up_bias": "mlp.gate_proj.bias mlp.up_proj.bias",
    "down": "mlp.down_proj.weight",
    "down_bias": "mlp.down_proj.bias",
}
_GEMMA_NAMES = _LAYER_NAMES | {
    "post_attn_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}
_EMBED = "embed_tokens.weight"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_STRIP = 1 << 22
"""Bytes per read of a slice, which bounds the copy that safetensors makes."""
_UNUSED_PARTS = ("rotary_emb.inv_freq", "vision_tower.", "multi_modal_projector.")
"""Substrings in names of tensors that a decoder does not need: rotary tables, image encoders."""


def hf_mapping(
    config: ModelConfig, prefix: str = "model.", head: str = "lm_head.weight"
) -> ParamMapping:
    """The safetensors of each canonical parameter.

    Args:
      config: the decoder's config.
      prefix: prefix of `embed_tokens.weight` and `layers.`.
      head: name of the output head.
    """
    gemma = config.family == "gemma3"
    names = {
        "embed": prefix + _EMBED,
        "final_norm": prefix + "norm.weight",
        "head": head,
        **(_GEMMA_NAMES if gemma else _LAYER_NAMES),
    }
    # Gemma's norms multiply by one plus the stored weight.
    return map_names(config, names, prefix + "layers.{}.", norm_offset=1.0 if gemma else 0.0)


def open_hf(folder: Path) -> Checkpoint:
    """Opens a Hugging Face folder.

    Raises:
      CheckpointError: the architecture is unknown, an option is not supported, or files are
        missing, truncated, or do not match the config.
    """
    generation = folder / "generation_config.json"
    try:
        config = from_hf(
            read_json(folder / "config.json"),
            read_json(generation) if generation.exists() else None,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    source = Safetensors(folder)
    names = source.shapes()
    prefix = next((name.removesuffix(_EMBED) for name in names if name.endswith(_EMBED)), "model.")
    head = next((name for name in names if name.endswith("lm_head.weight")), "lm_head.weight")

    def ignored(name: str) -> bool:
        # A tied checkpoint may also contain the head; `transformers` ignores it too.
        return any(part in name for part in _UNUSED_PARTS) or (
            config.tie_embeddings and name == head
        )

    return Checkpoint(
        config=config,
        origin=str(folder),
        source=source,
        mapped=hf_mapping(config, prefix, head),
        build_tokenizer=lambda: read_tokenizer(folder, config.eos_token_ids),
        ignored=ignored,
        files=source.files,
    )


class Safetensors:
    """The tensors of a folder's safetensors file, or of the files that its index lists.

    Attributes:
      files: state of the files before they were opened.

    Raises:
      CheckpointError: there is no file, or a file is missing, truncated or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, Shape] = {}
        self._types: dict[str, str] = {}
        self._opened: dict[Path, Any] = {}
        paths = _shards(folder)
        self.files = SourceFiles.record(paths)
        for path in paths:
            try:
                with safe_open(path, "numpy") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        if name in self._files:
                            raise CheckpointError(
                                f"{folder}: tensor {name} is in both {self._files[name].name} "
                                f"and {path.name}"
                            )
                        self._files[name] = path
                        header = file.get_slice(name)
                        self._shapes[name] = tuple(header.get_shape())
                        self._types[name] = header.get_dtype()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: truncated or unreadable: {error}") from error

    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        return self._read(name, lambda file: file.get_tensor(name))

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `checkpoint.SliceSource`."""
        return np.dtype(ml_dtypes.bfloat16 if self._types[name] == "BF16" else np.float32)

    def read_into(self, out: np.ndarray, name: str, axis: int, start: int) -> Wait:
        """See `checkpoint.SliceSource`."""
        first = [start if index == axis else 0 for index in range(out.ndim)]
        step = max(1, _STRIP * len(out) // max(1, out.nbytes))

        def read() -> None:
            for row in range(0, len(out), step):
                strip = out[row : row + step]
                index = tuple(
                    slice(low, low + count)
                    for low, count in zip([first[0] + row, *first[1:]], strip.shape, strict=True)
                )
                strip[...] = self._read_slice(name, index)

        return read

    def _read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._read(name, lambda file: file.get_slice(name)[index])

    def _read(self, name: str, get: Callable[[Any], np.ndarray]) -> np.ndarray:
        path = self._files[name]
        try:
            if path not in self._opened:  # opening is expensive
                self._opened[path] = safe_open(path, "numpy")
            array = get(self._opened[path])
        except (OSError, SafetensorError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot read tensor {name}: {error}") from error
        if array.dtype in (np.float32, ml_dtypes.bfloat16):
            return array
        if array.dtype in (np.float16, np.float64):
            return array.astype(np.float32)
        raise CheckpointError(
            f"{path}: tensor {name} is {array.dtype}: quantized safetensors are not supported"
        )


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: no weight_map")
        paths = [folder / name for name in dict.fromkeys(weight_map.values())]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise CheckpointError(f"{folder}: missing files of the index: {', '.join(missing)}")
        return paths
    single = folder / _SINGLE
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no safetensors file")
    return paths


def save_hf(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, np.ndarray],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a folder that `open_hf` and `transformers` can load.

    Args:
      folder: created if it is missing.
      config: the decoder's config.
      params: all canonical parameters, as arrays that NumPy can convert.
      tokenizer: written as tokenizer.json and tokenizer_config.json.

    Raises:
      CheckpointError: a parameter is missing or has the wrong shape, or config.json cannot express
        the config.
    """
    hf_config = to_hf(config)
    tensors: dict[str, np.ndarray] = {}
    mapped = hf_mapping(config)
    for name, shape in param_shapes(config).items():
        if name not in params or tuple(params[name].shape) != shape:
            actual = f"shape {list(params[name].shape)}" if name in params else "no array"
            raise CheckpointError(f"{name}: {actual}, expected {list(shape)}")
        for stored, tensor in split_param(mapped[name], np.asarray(params[name])):
            tensors[stored] = np.ascontiguousarray(tensor)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", "utf-8")
    if tokenizer is not None:
        for file, text in tokenizer.files().items():
            (folder / file).write_text(text, "utf-8")
