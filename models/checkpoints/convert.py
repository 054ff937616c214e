"""Conversion of a checkpoint to MuxJAX's format (`orbax`), which loads faster."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints import orbax
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.disk_errors import check_space, write_failure
from muxjax.models.nn.params import param_shapes
from muxjax.termination import unfinished_folder

_TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def convert(
    checkpoint: Checkpoint, folder: Path, dtype: Literal["keep", "float32", "bfloat16"] = "keep"
) -> int:
    """Writes a checkpoint in MuxJAX's format.

    Writes to a temporary folder beside `folder` and renames it when it is complete and on the disk.
    An interrupted conversion therefore leaves no incomplete checkpoint. One parameter at a time is
    in host memory.

    Args:
      checkpoint: the source.
      folder: destination; must not exist.
      dtype: type of the matrices; norms and biases are unchanged. 'keep': the source's type, or
        float32 if the source is quantized.

    Returns:
      Bytes of the parameters.

    Raises:
      CheckpointError: the folder exists or cannot be written, a weight cannot be read, or the
        source changed meanwhile. What was written is deleted.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: remove it, or choose another name")
    params = _ConvertedParams(checkpoint, dtype)
    try:
        with _destination(folder) as unfinished:
            check_space(unfinished, params.expected_bytes)
            orbax.save(unfinished, checkpoint.config, params, checkpoint.tokenizer)
            checkpoint.files.check_unchanged()
            unfinished.rename(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {folder}: {write_failure(error)}") from error
    return params.nbytes


@contextlib.contextmanager
def _destination(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, deleted at the end unless it was renamed.

    Also deletes those of conversions that were killed. A conversion that runs holds a lock on its
    folder, which the system releases when the process ends.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.glob(f"{glob.escape(folder.name)}.unfinished-*"):
        with contextlib.suppress(OSError), _locked(other):
            shutil.rmtree(other)
    unfinished = folder.with_name(f"{folder.name}.unfinished-{secrets.token_hex(4)}")
    unfinished.mkdir()
    with unfinished_folder(unfinished), _locked(unfinished):
        yield unfinished


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder.

    Raises:
      OSError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


class _ConvertedParams(Mapping[str, np.ndarray]):
    """A checkpoint's parameters in another type, each read on access.

    Attributes:
      nbytes: bytes of the parameters that were read.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        self._checkpoint = checkpoint
        self._shapes = param_shapes(checkpoint.config)
        self._dtype = dtype
        self.nbytes = 0

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._checkpoint.read_param(name)
        if self._dtype != "keep" and not name.endswith(("norm", "bias")):
            array = array.astype(_TYPES[self._dtype], copy=False)
        self.nbytes += array.nbytes
        return array

    @property
    def expected_bytes(self) -> int:
        """The least number of bytes that will be written."""
        itemsize = 4 if self._dtype == "float32" else 2
        return itemsize * sum(math.prod(shape) for shape in self._shapes.values())

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # does not read the parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
