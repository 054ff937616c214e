"""Conversion of a checkpoint to MuxJAX's format (`orbax`), which loads faster."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints import orbax
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.nn.params import param_shapes

_TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def convert(
    checkpoint: Checkpoint, folder: Path, dtype: Literal["keep", "float32", "bfloat16"] = "keep"
) -> int:
    """Writes a checkpoint in MuxJAX's format.

    Writes to a temporary folder beside `folder` and renames it when complete. An interrupted
    conversion therefore leaves no incomplete checkpoint. One parameter at a time is in host memory.

    Args:
      checkpoint: the source.
      folder: destination; must not exist.
      dtype: type of the matrices; norms and biases are unchanged. 'keep': the source's type, or
        float32 if the source is quantized.

    Returns:
      Bytes of the parameters.

    Raises:
      CheckpointError: the folder exists, or a weight cannot be read.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: remove it, or choose another name")
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    params = _ConvertedParams(checkpoint, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        orbax.save(unfinished, checkpoint.config, params, checkpoint.tokenizer)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return params.nbytes


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

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # does not read the parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
