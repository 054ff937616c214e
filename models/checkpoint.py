"""An open checkpoint: its config, its tokenizer, and its weights one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.config import ModelConfig
from muxjax.models.params import (
    Mapped,
    Shape,
    assemble,
    check_shapes,
    param_shapes,
    stored_shapes,
)
from muxjax.models.tokenizer import Tokenizer


@runtime_checkable
class TensorSource(Protocol):
    """The tensors of one checkpoint, under the names and in the shapes of its own format."""

    def shapes(self) -> Mapping[str, Shape]:
        """All tensors and their shapes, from headers only."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, as float32 or ml_dtypes.bfloat16; CheckpointError when it cannot be read."""


def ignore_none(name: str) -> bool:
    """For checkpoints in which every tensor must be the model's."""
    return False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose header has been read and whose tensors' shapes fit its config.

    Attributes:
      config: the decoder's shape and options.
      origin: where it comes from, for people: a file, a folder, a package.
      source: reads the stored tensors.
      mapped: which stored tensors make each canonical parameter.
      make_tokenizer: builds the tokenizer, None where the checkpoint has none.
      ignored: stored tensors that may be present and are not used.

    Raises:
      CheckpointError: on construction, where a tensor is missing, misshapen or unknown.
    """

    config: ModelConfig
    origin: str
    source: TensorSource
    mapped: Mapped
    make_tokenizer: Callable[[], Tokenizer | None]
    ignored: Callable[[str], bool] = field(default=ignore_none)

    def __post_init__(self) -> None:
        wanted = stored_shapes(self.config, self.mapped)
        check_shapes(self.origin, self.source.shapes(), wanted, self.ignored)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, built on first use (seconds for the largest vocabularies)."""
        return self.make_tokenizer()

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every canonical parameter once, in the order of `param_shapes`.

        One is in memory at a time. The type is float32 or bfloat16, as the checkpoint has it
        (float16 and quantised tensors become float32); the arrays are the caller's to keep.

        Raises:
          CheckpointError: a tensor that cannot be read or decoded.
        """
        for name, shape in param_shapes(self.config).items():
            array = assemble(self.mapped[name], self.source.read)
            if array.shape != shape:
                raise CheckpointError(
                    f"{self.origin}: {name} was read with shape {list(array.shape)}, "
                    f"wanted {list(shape)}"
                )
            yield name, array
