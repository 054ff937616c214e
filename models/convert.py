"""From any checkpoint that can be opened to one of our own (`orbax`), which loads faster."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models import orbax
from muxjax.models.checkpoint import Checkpoint

_TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def convert(
    checkpoint: Checkpoint, folder: Path, dtype: Literal["keep", "float32", "bfloat16"] = "keep"
) -> int:
    """Writes a checkpoint anew.

    It is written beside `folder`, under another name, and takes its name when it is complete, so
    that a conversion that is interrupted leaves nothing under it. All of the model is in the host's
    memory meanwhile.

    Args:
      checkpoint: the source.
      folder: must not exist.
      dtype: of the matrices; norms and biases stay as they are. 'keep': as the source gives them,
        float32 where it was quantised.

    Returns:
      Bytes of the parameters.

    Raises:
      CheckpointError: the folder exists, or a weight cannot be read.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: remove it, or choose another name")
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    params: dict[str, np.ndarray] = {}
    for name, array in checkpoint.weights():
        small = name.endswith(("norm", "bias"))
        kept = dtype == "keep" or small
        params[name] = array if kept else array.astype(_TYPES[dtype], copy=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        orbax.save(unfinished, checkpoint.config, params, checkpoint.tokenizer)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return sum(array.nbytes for array in params.values())
