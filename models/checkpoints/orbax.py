"""MuxJAX's checkpoint format: the canonical parameters in an Orbax pytree, the config in JSON.

folder/muxjax.json      format version, config, and the size of every other file
folder/params/          Orbax: {"embed": ..., "layers": {"0": {"qkv": ...}}}
folder/tokenizer*.json  Hugging Face's tokenizer files
folder/SHA256SUMS       digests of all files

`muxjax.json` is removed before anything else is written, and appears when all other files are on
the disk. A folder without it is incomplete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.orbax_reader import CONFIG_FILE, FORMAT, PARAMS_FOLDER
from muxjax.models.digests import SUMS_FILE, sha256_of, write_sums
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import Shape, param_shapes
from muxjax.models.tokenizers.tokenizer import Tokenizer

_TYPES = ("float32", "bfloat16")
_CHUNK_BYTES = 4 << 20
"""Bytes of a chunk. Chunks are not compressed, since weights compress poorly. Readers map them into
memory, so only a shard's bytes are read."""


def save(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a checkpoint, and replaces an earlier one in the same folder.

    Args:
      folder: created if it is missing.
      config: the decoder's config.
      params: all canonical parameters (NumPy or JAX arrays), in the type to be stored. Each is
        accessed only when it is written, so a lazy mapping needs memory for one.
      tokenizer: written to the same folder.

    Raises:
      CheckpointError: a parameter is missing, has the wrong shape, or is quantized.
      OSError, ValueError: a file cannot be written; the folder is incomplete.
    """
    nested: dict[str, Any] = {}
    for name, shape in param_shapes(config).items():
        if name not in params:
            raise CheckpointError(f"{name}: no array, expected {list(shape)}")
        *parents, leaf = name.split(".")
        inner = nested
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[leaf] = _Parameter(name, shape, params)
    folder.mkdir(parents=True, exist_ok=True)
    for marker in (CONFIG_FILE, SUMS_FILE):
        (folder / marker).unlink(missing_ok=True)
    registry = type_handlers.create_type_handler_registry(
        (_Parameter, _SequentialHandler()),
        (jax.Array, type_handlers.ArrayHandler()),  # unused, but Orbax warns without it
    )
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=False, use_zarr3=False
    )
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), nested)
    with _without_logged_errors(), ocp.Checkpointer(handler) as checkpointer:
        path = folder.resolve() / PARAMS_FOLDER
        checkpointer.save(path, nested, force=True, save_args=chunked)
    written = [path for path in (folder / PARAMS_FOLDER).rglob("*") if path.is_file()]
    for file, text in (tokenizer.files() if tokenizer is not None else {}).items():
        (folder / file).write_text(text, "utf-8")
        written.append(folder / file)
    _complete(folder, config, written)


@contextlib.contextmanager
def _without_logged_errors() -> Iterator[None]:
    """Silences the tracebacks that Orbax's threads log; the errors are raised too."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _complete(folder: Path, config: ModelConfig, written: Sequence[Path]) -> None:
    """Writes the digests of the other files, and then `muxjax.json`, which marks the end."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(written)}
    contents = {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "files": {name: path.stat().st_size for name, path in names.items()},
    }
    text = json.dumps(contents, indent=2) + "\n"
    sums = {name: sha256_of(path) for name, path in names.items()}
    write_sums(folder, sums | {CONFIG_FILE: hashlib.sha256(text.encode()).hexdigest()})
    parents = {parent for path in names.values() for parent in path.parents}
    folders = [parent for parent in parents if parent.is_relative_to(folder)]
    for path in (*names.values(), folder / SUMS_FILE, *folders):
        _write_to_disk(path)
    unfinished = folder / f"{CONFIG_FILE}.unfinished"
    unfinished.write_text(text, "utf-8")
    _write_to_disk(unfinished)
    unfinished.rename(folder / CONFIG_FILE)
    _write_to_disk(folder)


def _write_to_disk(path: Path) -> None:
    """Waits until a file or the entries of a folder would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A leaf of the pytree. Its array is read only when Orbax writes it."""

    name: str
    shape: Shape
    params: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Number of elements; Orbax rejects empty arrays."""
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        array = self.params[self.name]
        if tuple(array.shape) != self.shape:
            raise CheckpointError(
                f"{self.name}: shape {list(array.shape)}, expected {list(self.shape)}"
            )
        if array.dtype.name not in _TYPES:
            raise CheckpointError(
                f"{self.name} is {array.dtype}: checkpoints store {' or '.join(_TYPES)}; save the "
                "unquantized weights and set `quantization: int8` where they are served"
            )
        return np.asarray(array)


class _SequentialHandler(type_handlers.NumpyHandler):
    """Writes parameters as NumPy arrays, each before the next is read.

    Orbax's handler copies all of them first, which needs twice the model's size in host memory.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(
        self, values: Sequence[_Parameter], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> None:
        for value, info, arg in zip(values, infos, args or (), strict=True):
            await super()._background_serialize([value.read()], [info], [arg])
