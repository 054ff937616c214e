"""An open checkpoint: its config, its tokenizer, and its weights one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.config import ModelConfig
from muxjax.models.params import (
    Mapped,
    Part,
    Shape,
    assemble,
    check_shapes,
    param_shapes,
    stored_shapes,
)
from muxjax.models.shards import Piece, Shards
from muxjax.models.tokenizer import Tokenizer


@runtime_checkable
class TensorSource(Protocol):
    """The tensors of one checkpoint, under the names and in the shapes of its own format."""

    def shapes(self) -> Mapping[str, Shape]:
        """All tensors and their shapes, from headers only."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, as float32 or ml_dtypes.bfloat16; CheckpointError when it cannot be read."""


@runtime_checkable
class PartSource(TensorSource, Protocol):
    """A source that need not read the whole of a tensor for a part of it."""

    def read_part(self, name: str, axis: int, start: int, stop: int) -> np.ndarray:
        """What `read` gives, from `start` to `stop` along an axis."""


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

    def part(self, name: str, shards: Shards, device: int) -> np.ndarray:
        """What one device keeps of a canonical parameter; see `Shards.cut`.

        Only that is read, where the format allows it.

        Raises:
          CheckpointError: a tensor that cannot be read or decoded.
        """
        cut = shards.pieces(name, device)
        if cut is None:
            return self.whole(name)
        axis, pieces = cut
        source, parts = self.source, self.mapped[name]
        if not isinstance(source, PartSource) or any(part.interleaved_heads for part in parts):
            return shards.cut(name, self.whole(name), device)
        return _filled(_read(source, parts, axis, pieces), shards.shapes[name], axis)

    def whole(self, name: str) -> np.ndarray:
        """A canonical parameter, in float32 or bfloat16.

        Raises:
          CheckpointError: a tensor that cannot be read or decoded.
        """
        array, shape = assemble(self.mapped[name], self.source.read), self._shapes[name]
        if array.shape != shape:
            raise CheckpointError(
                f"{self.origin}: {name} was read with shape {list(array.shape)}, "
                f"wanted {list(shape)}"
            )
        return array

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return param_shapes(self.config)

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every canonical parameter once, in the order of `param_shapes`.

        One is in memory at a time. The type is float32 or bfloat16, as the checkpoint has it
        (float16 and quantised tensors become float32); the arrays are the caller's to keep.

        Raises:
          CheckpointError: a tensor that cannot be read or decoded.
        """
        for name in self._shapes:
            yield name, self.whole(name)


def _read(
    source: PartSource, parts: tuple[Part, ...], axis: int, pieces: Sequence[Piece]
) -> Iterator[tuple[int, np.ndarray | None]]:
    """The pieces of a parameter, one after the other: how long each is, and its numbers or None."""
    for start, count in pieces:
        if start is None:
            yield count, None
            continue
        first = 0
        for part in parts:
            # Along the rows a parameter is made of its tensors; a column goes through all of one.
            rows = part.rows if axis == 0 else start + count
            low, high = max(start, first), min(start + count, first + rows)
            if low < high:
                array = source.read_part(part.name, axis, low - first, high - first)
                if part.plus:
                    array = array.astype(np.float32) + np.float32(part.plus)
                yield high - low, array
            first += rows


def _filled(pieces: Iterator[tuple[int, np.ndarray | None]], shape: Shape, axis: int) -> np.ndarray:
    """The pieces one after the other along an axis, with zeros for those that are None."""
    whole: np.ndarray | None = None
    at = 0
    for count, piece in pieces:
        if piece is not None:
            if piece.shape == shape:
                return piece
            if whole is None:
                whole = np.zeros(shape, piece.dtype)
            elif whole.dtype != piece.dtype:
                whole = whole.astype(np.float32)
            whole[(slice(None),) * axis + (slice(at, at + count),)] = piece
        at += count
    return np.zeros(shape, np.float32) if whole is None else whole
