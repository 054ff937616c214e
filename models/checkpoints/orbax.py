"""Our own checkpoints: the canonical parameters in an Orbax pytree, the config in `muxjax.json`.

folder/muxjax.json    format version and config
folder/params/        Orbax: {"embed": ..., "layers": {"0": {"qkv": ...}}}
folder/tokenizer*.json  as Hugging Face has them
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.orbax_reader import CONFIG_FILE, FORMAT, PARAMS_FOLDER
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import Shape, param_shapes
from muxjax.models.tokenizers.tokenizer import Tokenizer

_TYPES = ("float32", "bfloat16")
_CHUNK_BYTES = 4 << 20
"""Weights are noise, so not compressed; of mapped chunks of any size a part is read."""


def save(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a checkpoint; what the folder held of an earlier one is replaced.

    Args:
      folder: made where it is missing.
      config: the decoder.
      params: all canonical parameters (numpy or JAX arrays), in the type to be stored. Each is
        asked for when it is written, so that a mapping that reads them need hold one at a time.
      tokenizer: written beside them.

    Raises:
      CheckpointError: a parameter is missing, misshapen or quantized.
    """
    nested: dict[str, Any] = {}
    for name, shape in param_shapes(config).items():
        if name not in params:
            raise CheckpointError(f"{name}: found nothing, wanted {list(shape)}")
        *above, last = name.split(".")
        inner = nested
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = _Parameter(name, shape, params)
    folder.mkdir(parents=True, exist_ok=True)
    registry = type_handlers.create_type_handler_registry(
        (_Parameter, _OneByOne()),
        (jax.Array, type_handlers.ArrayHandler()),  # there are none, but Orbax warns without it
    )
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=False, use_zarr3=False
    )
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), nested)
    with ocp.Checkpointer(handler) as checkpointer:
        path = folder.resolve() / PARAMS_FOLDER
        checkpointer.save(path, nested, force=True, save_args=chunked)
    for file, text in (tokenizer.files() if tokenizer is not None else {}).items():
        (folder / file).write_text(text, "utf-8")
    described = {"format": FORMAT, "config": dataclasses.asdict(config)}
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", "utf-8")


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A leaf of the tree: an array that is read when it is written."""

    name: str
    shape: Shape
    params: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Numbers in it; Orbax refuses what is empty."""
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        array = self.params[self.name]
        if tuple(array.shape) != self.shape:
            raise CheckpointError(
                f"{self.name}: found {list(array.shape)}, wanted {list(self.shape)}"
            )
        if array.dtype.name not in _TYPES:
            raise CheckpointError(
                f"{self.name} is {array.dtype}: checkpoints hold {' or '.join(_TYPES)}; save the "
                "unquantized weights and set `quantization: int8` where they are served"
            )
        return np.asarray(array)


class _OneByOne(type_handlers.NumpyHandler):
    """Writes parameters as NumPy's arrays, each before the next is read.

    Orbax's own copies all of them first: a model twice in the host's memory.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(
        self, values: Sequence[_Parameter], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> None:
        for value, info, arg in zip(values, infos, args or (), strict=True):
            await super()._background_serialize([value.read()], [info], [arg])
