"""An open checkpoint: its config, tokenizer, and weights, which are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.buffers import aligned_empty
from muxjax.models.checkpoints.source_files import SourceFiles
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import (
    ParamMapping,
    Shape,
    TensorPart,
    assemble_param,
    check_shapes,
    param_shapes,
    stored_shapes,
)
from muxjax.models.nn.shards import Segment, Shards
from muxjax.models.tokenizers.tokenizer import Tokenizer

Wait = Callable[[], object]
"""Waits for a read that was started; raises its error."""


@runtime_checkable
class TensorSource(Protocol):
    """The tensors of one checkpoint, with the names and shapes of its format."""

    def shapes(self) -> Mapping[str, Shape]:
        """All tensors and their shapes, from the headers only."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, as float32 or ml_dtypes.bfloat16.

        Raises:
          CheckpointError: the tensor cannot be read.
        """


@runtime_checkable
class SliceSource(TensorSource, Protocol):
    """A source that can read a slice of a tensor without reading all of it."""

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type that `read` returns, from the header only."""

    def read_into(self, out: np.ndarray, name: str, axis: int, start: int) -> Wait:
        """Starts to read a slice of a tensor into `out`, whose shape gives the slice's size.

        Args:
          out: destination, of type `dtype(name)`.
          name: the tensor's name.
          axis: the axis along which the slice is taken.
          start: first index along the axis.

        Returns:
          A function that waits until `out` is complete, and raises the errors of `read`. The source
          reads in the background, or when the function is called.
        """


def accept_no_extra(name: str) -> bool:
    """False: every tensor of the checkpoint must belong to the model."""
    return False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose header has been read and whose tensors have the shapes of its config.

    Attributes:
      config: the decoder's sizes and options.
      origin: the source to name in messages: a file, a folder or a package.
      source: reads the stored tensors.
      mapped: the stored tensors of each canonical parameter.
      build_tokenizer: builds the tokenizer; returns None where the checkpoint has none.
      ignored: whether a stored tensor that does not belong to the model may be present.
      files: the files with the weights, as they were when the header was read.

    Raises:
      CheckpointError: a tensor is missing, has the wrong shape, or is unknown.
    """

    config: ModelConfig
    origin: str
    source: TensorSource
    mapped: ParamMapping
    build_tokenizer: Callable[[], Tokenizer | None]
    ignored: Callable[[str], bool] = field(default=accept_no_extra)
    files: SourceFiles = field(default_factory=SourceFiles)

    def __post_init__(self) -> None:
        expected = stored_shapes(self.config, self.mapped)
        check_shapes(self.origin, self.source.shapes(), expected, self.ignored)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, built on first use (seconds for the largest vocabularies)."""
        return self.build_tokenizer()

    def read_shard(self, name: str, shards: Shards, device: int) -> np.ndarray:
        """One device's shard of a canonical parameter (`Shards.shard_param`).

        Reads only the shard if the format supports it.

        Raises:
          CheckpointError: a tensor cannot be read or decoded.
        """
        return self.start_reading_shard(name, shards, device)()

    def start_reading_shard(
        self, name: str, shards: Shards, device: int
    ) -> Callable[[], np.ndarray]:
        """Starts to read a shard; the returned function waits for it and returns it.

        Orbax checkpoints are read in the background, others when the function is called.
        """
        source, parts = self.source, self.mapped[name]
        if not isinstance(source, SliceSource) or any(part.interleaved_heads for part in parts):
            return lambda: shards.shard_param(name, self.read_param(name), device)
        shape = shards.shapes[name]
        axis, segments = shards.segments(name, device) or (0, [(0, shape[0])])
        has_offset = any(part.offset for part in parts)
        types = {source.dtype(part.name) for part in parts}
        dtype = np.float32 if has_offset or len(types) > 1 else types.pop()
        array = aligned_empty(shape, dtype)
        started = list(_start_filling(array, source, parts, axis, segments))

        def finish() -> np.ndarray:
            for wait in started:
                wait()
            return array

        return finish

    def read_param(self, name: str) -> np.ndarray:
        """A whole canonical parameter, in float32 or bfloat16.

        Raises:
          CheckpointError: a tensor cannot be read or decoded.
        """
        array, shape = assemble_param(self.mapped[name], self.source.read), self._shapes[name]
        if array.shape != shape:
            raise CheckpointError(
                f"{self.origin}: {name} was read with shape {list(array.shape)}, "
                f"expected {list(shape)}"
            )
        return array

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return param_shapes(self.config)

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every canonical parameter once, in the order of `param_shapes`.

        One is in memory at a time, as float32 or bfloat16; float16 and quantized tensors become
        float32. The caller owns the arrays.

        Raises:
          CheckpointError: a tensor cannot be read or decoded.
        """
        for name in self._shapes:
            yield name, self.read_param(name)


def _start_filling(
    array: np.ndarray,
    source: SliceSource,
    parts: tuple[TensorPart, ...],
    axis: int,
    segments: Sequence[Segment],
) -> Iterator[Wait]:
    """Starts to read the segments of a parameter into `array`, consecutively along an axis."""
    position = 0
    for start, count in segments:
        if start is None:
            _slice_along(array, axis, position, count)[...] = 0
            position += count
            continue
        first = 0
        for part in parts:
            # Tensors are concatenated along the rows; sharding by columns implies a single tensor.
            rows = part.rows if axis == 0 else start + count
            low, high = max(start, first), min(start + count, first + rows)
            if low < high:
                out = _slice_along(array, axis, position, high - low)
                yield _start_reading(source, part, out, axis, low - first)
                position += high - low
            first += rows


def _start_reading(
    source: SliceSource, part: TensorPart, out: np.ndarray, axis: int, start: int
) -> Wait:
    dtype = source.dtype(part.name)
    if out.dtype == dtype and not part.offset:
        return source.read_into(out, part.name, axis, start)

    def convert() -> None:
        stored = np.empty(out.shape, dtype)
        source.read_into(stored, part.name, axis, start)()
        np.add(stored, np.float32(part.offset), out=out, dtype=np.float32)

    return convert


def _slice_along(array: np.ndarray, axis: int, start: int, count: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(start, start + count),)]
