"""Our own checkpoints: the canonical parameters in an Orbax pytree, the config in `muxjax.json`.

folder/muxjax.json    format version and config
folder/params/        Orbax: {"embed": ..., "layers": {"0": {"qkv": ...}}}
folder/tokenizer*.json  as Hugging Face has them
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from muxjax.errors import CheckpointError
from muxjax.models.checkpoint import Checkpoint
from muxjax.models.config import ModelConfig, config_from_dict
from muxjax.models.hf_tokenizer import read_tokenizer
from muxjax.models.json_files import read_json
from muxjax.models.params import Part, Shape, param_shapes
from muxjax.models.tokenizer import Tokenizer

FORMAT = 1
CONFIG_FILE, PARAMS_FOLDER = "muxjax.json", "params"
_TYPES = ("float32", "bfloat16")
_CHUNK_BYTES = 4 << 20
"""A device's part is read in chunks: one chunk a parameter would be read whole for every device.
Weights are noise, so they are not compressed."""


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
      CheckpointError: a parameter is missing, misshapen or quantised.
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
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
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
                "unquantised weights and set `quantization: int8` where they are served"
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


def restore(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Reads a whole checkpoint: its config and its canonical parameters.

    Raises:
      CheckpointError: as `open_orbax`.
    """
    checkpoint = open_orbax(folder)
    return checkpoint.config, dict(checkpoint.weights())


def open_orbax(folder: Path) -> Checkpoint:
    """Opens a folder that `save` wrote.

    Raises:
      CheckpointError: another format, a broken config, or parameters that do not fit it.
    """
    described = read_json(folder / CONFIG_FILE)
    if described.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: format {described.get('format')!r}; this version reads {FORMAT}"
        )
    try:
        config = config_from_dict(described["config"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: not a config: {error}") from error
    shapes = param_shapes(config)
    return Checkpoint(
        config=config,
        origin=str(folder),
        source=_OrbaxTensors(folder / PARAMS_FOLDER),
        mapped={name: (Part(name, shape[0]),) for name, shape in shapes.items()},
        make_tokenizer=lambda: read_tokenizer(folder, config.eos_token_ids),
    )


class _OrbaxTensors:
    """The parameters of an Orbax folder under their canonical names.

    Orbax describes the tree; the arrays are read by what it keeps them in, TensorStore, each once
    opened and then only the part that is asked for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.metadata(self._folder).item_metadata
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: not an Orbax checkpoint: {error}") from error
        if tree is None:
            raise CheckpointError(f"{folder}: not an Orbax checkpoint")
        self._shapes = {name: tuple(leaf.shape) for name, leaf in _leaves(tree.tree)}
        self._zarr3 = bool(getattr(tree, "use_zarr3", False))
        self._context = ts.Context()

    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        return self._read(name, ())

    def read_part(self, name: str, axis: int, start: int, stop: int) -> np.ndarray:
        """See `checkpoint.PartSource`."""
        return self._read(name, (slice(None),) * axis + (slice(start, stop),))

    def _read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        spec = {
            "driver": "zarr3" if self._zarr3 else "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{self._folder}/", "path": f"{name}/"},
        }
        try:
            array = ts.open(spec, read=True, open=True, context=self._context).result()
            read = array[index].read().result() if index else array.read().result()
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self._folder}: cannot read {name}: {error}") from error
        return read if read.dtype.name == "bfloat16" else np.asarray(read, np.float32)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
