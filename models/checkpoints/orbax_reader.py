"""Reads the checkpoints that `orbax` writes, one device's shard at a time.

Orbax stores arrays in TensorStore's formats: zarr arrays in the folder's OCDBT database. This
module reads them with TensorStore, for two reasons. `import orbax.checkpoint` takes longer than
loading a small model. Orbax also restores into arrays that it allocates; here a shard is copied
once, from the page cache into the memory that the device uses. Weights are not compressed, so files
are memory-mapped and only the shard's bytes are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.buffers import aligned_empty
from muxjax.models.checkpoints.checkpoint import Checkpoint, Wait
from muxjax.models.checkpoints.source_files import SourceFiles
from muxjax.models.json_files import read_json
from muxjax.models.nn.config import ModelConfig, config_from_dict
from muxjax.models.nn.params import Shape, TensorPart, param_shapes
from muxjax.models.tokenizers.hf_tokenizer import read_tokenizer

FORMAT = 1
CONFIG_FILE, PARAMS_FOLDER = "muxjax.json", "params"
_HEADER = ".zarray"
_TYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
_INDEX_CACHE = 1 << 24
"""Bytes of the cache of OCDBT's index. Without it, the index is read for each chunk."""


def restore(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Reads a whole checkpoint: its config and its canonical parameters.

    Raises:
      CheckpointError: see `open_orbax`.
    """
    checkpoint = open_orbax(folder)
    return checkpoint.config, dict(checkpoint.weights())


def open_orbax(folder: Path) -> Checkpoint:
    """Opens a folder that `orbax.save` wrote.

    Raises:
      CheckpointError: a file is missing or has another size, another format version, an invalid
        config, or parameters that contradict it.
    """
    files = SourceFiles.record(
        [folder / CONFIG_FILE, *(p for p in (folder / PARAMS_FOLDER).rglob("*") if p.is_file())]
    )
    contents = read_json(folder / CONFIG_FILE)
    if contents.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: format {contents.get('format')!r}; this version reads {FORMAT}"
        )
    try:
        config = config_from_dict(contents["config"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: not a valid config: {error}") from error
    _check_sizes(folder, contents.get("files"))
    shapes = param_shapes(config)
    return Checkpoint(
        config=config,
        origin=str(folder),
        source=OrbaxTensors(folder / PARAMS_FOLDER),
        mapped={name: (TensorPart(name, shape[0]),) for name, shape in shapes.items()},
        build_tokenizer=lambda: read_tokenizer(folder, config.eos_token_ids),
        files=files,
    )


def _check_sizes(folder: Path, sizes: object) -> None:
    """Checks that all files are there; older folders do not list them.

    Raises:
      CheckpointError: a file is missing or has another size.
    """
    for name, expected in (sizes if isinstance(sizes, dict) else {}).items():
        path = folder / str(name)
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} of {expected} bytes"
            raise CheckpointError(
                f"{folder}: incomplete: {name} {found}: copy or convert the model again"
            )


class OrbaxTensors:
    """The parameters of an Orbax folder by their canonical names.

    Raises:
      CheckpointError: the folder has no parameters, or one has a type that `orbax.save` does not
        write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        files = {
            "driver": "file",
            "path": f"{self._folder}/",
            "file_io_mode": {"mode": "memmap"},
        }
        index = {"driver": "ocdbt", "base": files, "cache_pool": "cache_pool#ocdbt"}
        context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": _INDEX_CACHE}})
        try:
            keys = ts.KvStore.open(index, context=context).result().list().result()
            names = [
                key.decode().removesuffix(f"/{_HEADER}")
                for key in keys
                if key.endswith(f"/{_HEADER}".encode())
            ]
            opening = {
                name: ts.open(
                    {"driver": "zarr", "kvstore": index | {"path": f"{name}/"}},
                    read=True,
                    open=True,
                    context=context,
                )
                for name in names
            }
            self._arrays = {name: array.result() for name, array in opening.items()}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: not an Orbax checkpoint: {error}") from error
        if not self._arrays:
            raise CheckpointError(f"{folder}: not an Orbax checkpoint")
        for name in self._arrays:
            if self.dtype(name) not in _TYPES:
                raise CheckpointError(
                    f"{folder}: {name} is {self.dtype(name)}; supported: float32, bfloat16"
                )

    def shapes(self) -> Mapping[str, Shape]:
        return {name: tuple(array.shape) for name, array in self._arrays.items()}

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `checkpoint.SliceSource`."""
        return np.dtype(self._arrays[name].dtype.numpy_dtype)

    def read(self, name: str) -> np.ndarray:
        array = aligned_empty(tuple(self._arrays[name].shape), self.dtype(name))
        self.read_into(array, name, 0, 0)()
        return array

    def read_into(self, out: np.ndarray, name: str, axis: int, start: int) -> Wait:
        """See `checkpoint.SliceSource`; TensorStore's threads read in the background."""
        index = (slice(None),) * axis + (slice(start, start + out.shape[axis]),)
        stored = self._arrays[name][index].translate_to[(0,) * out.ndim]
        started = ts.array(out).write(stored)

        def wait() -> None:
            try:
                started.result()
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"{self._folder}: cannot read {name}: {error}") from error

        return wait
