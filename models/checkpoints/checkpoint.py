"""An open checkpoint: its config, its tokenizer, and its weights one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.buffers import aligned_empty
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
from muxjax.models.nn.shards import Piece, Shards
from muxjax.models.tokenizers.tokenizer import Tokenizer

Wait = Callable[[], object]
"""Waits until what was started is done."""


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

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type that `read` gives, from the header only."""

    def read_into(self, out: np.ndarray, name: str, axis: int, start: int) -> Wait:
        """Fills `out`, of that type, with what `read` gives from `start` on along an axis.

        It is full when what is returned has been called, which raises as `read`. Until then, it is
        filled in the background or not at all.
        """


def accept_no_extra(name: str) -> bool:
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
      build_tokenizer: builds the tokenizer, None where the checkpoint has none.
      ignored: stored tensors that may be present and are not used.

    Raises:
      CheckpointError: on construction, where a tensor is missing, misshapen or unknown.
    """

    config: ModelConfig
    origin: str
    source: TensorSource
    mapped: ParamMapping
    build_tokenizer: Callable[[], Tokenizer | None]
    ignored: Callable[[str], bool] = field(default=accept_no_extra)

    def __post_init__(self) -> None:
        wanted = stored_shapes(self.config, self.mapped)
        check_shapes(self.origin, self.source.shapes(), wanted, self.ignored)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, built on first use (seconds for the largest vocabularies)."""
        return self.build_tokenizer()

    def read_shard(self, name: str, shards: Shards, device: int) -> np.ndarray:
        """What one device keeps of a canonical parameter; see `Shards.cut`.

        Only that is read, where the format allows it.

        Raises:
          CheckpointError: a tensor that cannot be read or decoded.
        """
        return self.start_reading_shard(name, shards, device)()

    def start_reading_shard(
        self, name: str, shards: Shards, device: int
    ) -> Callable[[], np.ndarray]:
        """Starts to read what `part` gives, and returns what waits for it.

        Sources that can read in the background (Orbax) do; others read when it is waited for.
        """
        source, parts = self.source, self.mapped[name]
        if not isinstance(source, PartSource) or any(part.interleaved_heads for part in parts):
            return lambda: shards.shard_param(name, self.read_param(name), device)
        shape = shards.shapes[name]
        axis, pieces = shards.segments(name, device) or (0, [(0, shape[0])])
        plain = not any(part.offset for part in parts)
        types = {source.dtype(part.name) for part in parts}
        array = aligned_empty(shape, types.pop() if plain and len(types) == 1 else np.float32)
        started = list(_fill(array, source, parts, axis, pieces))

        def finish() -> np.ndarray:
            for wait in started:
                wait()
            return array

        return finish

    def read_param(self, name: str) -> np.ndarray:
        """A canonical parameter, in float32 or bfloat16.

        Raises:
          CheckpointError: a tensor that cannot be read or decoded.
        """
        array, shape = assemble_param(self.mapped[name], self.source.read), self._shapes[name]
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
        (float16 and quantized tensors become float32); the arrays are the caller's to keep.

        Raises:
          CheckpointError: a tensor that cannot be read or decoded.
        """
        for name in self._shapes:
            yield name, self.read_param(name)


def _fill(
    whole: np.ndarray,
    source: PartSource,
    parts: tuple[TensorPart, ...],
    axis: int,
    pieces: Sequence[Piece],
) -> Iterator[Wait]:
    """Starts to put the pieces of a parameter one after the other along an axis."""
    at = 0
    for start, count in pieces:
        if start is None:
            _along(whole, axis, at, count)[...] = 0
            at += count
            continue
        first = 0
        for part in parts:
            # Along the rows a parameter is made of its tensors; a column goes through all of one.
            rows = part.rows if axis == 0 else start + count
            low, high = max(start, first), min(start + count, first + rows)
            if low < high:
                out = _along(whole, axis, at, high - low)
                yield _fill_from(source, part, out, axis, low - first)
                at += high - low
            first += rows


def _fill_from(
    source: PartSource, part: TensorPart, out: np.ndarray, axis: int, start: int
) -> Wait:
    dtype = source.dtype(part.name)
    if out.dtype == dtype and not part.offset:
        return source.read_into(out, part.name, axis, start)

    def convert() -> None:
        stored = np.empty(out.shape, dtype)
        source.read_into(stored, part.name, axis, start)()
        np.add(stored, np.float32(part.offset), out=out, dtype=np.float32)

    return convert


def _along(array: np.ndarray, axis: int, start: int, count: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(start, start + count),)]
