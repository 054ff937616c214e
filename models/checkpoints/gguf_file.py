"""The GGUF container: reads metadata, and dequantizes tensors by name.

The header is parsed here because `gguf.GGUFReader` creates several NumPy views for every string of
a vocabulary, which takes seconds for large ones. The `gguf` package provides the type tables and
the dequantization. Layout: llama.cpp's docs/gguf.md, versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.nn.params import Shape

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_DEFAULT_ALIGNMENT = 32
_CHUNK_VALUES = 1 << 20
"""Values dequantized at a time. The library creates several temporaries of this size, which should
fit the CPU's cache."""


@dataclass(frozen=True)
class TensorInfo:
    """Location of a tensor: `offset` in bytes from the file's start, `shape` outermost first."""

    shape: Shape
    kind: gguf.GGMLQuantizationType
    offset: int
    bytes_per_row: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def num_bytes(self) -> int:
        return self.rows * self.bytes_per_row


class _Cursor:
    """Reads little-endian values sequentially; raises CheckpointError at the end of the file."""

    def __init__(self, data: np.memmap, path: Path) -> None:
        self._view = memoryview(data)
        self._path = path
        self.position = 0

    def _advance(self, size: int) -> int:
        start, end = self.position, self.position + size
        if end > len(self._view):
            raise CheckpointError(
                f"{self._path}: truncated: the header extends past the file's end"
            )
        self.position = end
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self._view, self._advance(struct.calcsize(code)))[0]

    def string(self) -> str:
        size = self.scalar("Q")
        start = self._advance(size)
        # Some converters write strings that are not UTF-8; such files must load too.
        return str(self._view[start : start + size], "utf-8", "replace")

    def strings(self, count: int) -> list[str]:
        """Reads `count` strings in one loop, since a vocabulary has hundreds of thousands."""
        view, position, length = self._view, self.position, struct.Struct("<Q").unpack_from
        texts = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length(view, position)[0]
                texts.append(str(view[start:position], "utf-8", "replace"))
        except struct.error:
            position = len(view) + 1
        self._advance(position - self.position)
        return texts

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalar("I"), self.scalar("Q")
            if element in _SCALARS:
                dtype = np.dtype(_SCALARS[element]).newbyteorder("<")
                start = self._advance(count * dtype.itemsize)
                return np.frombuffer(self._view, dtype, count, start)
            if element == _STRING:
                return self.strings(count)
            return [self.value(element) for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._path}: unknown type {kind} in the metadata")
        return self.scalar(_SCALARS[kind])


class GGUFFile:
    """A GGUF file whose header has been read and checked against the file's size.

    Attributes:
      metadata: key -> number, bool, str, list of str, or NumPy array.
      tensors: name -> location.

    Raises:
      CheckpointError: the file is not GGUF, has another version, is truncated, or has a tensor of
        an unknown type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.stat().st_size < 24:
                raise CheckpointError(f"{path}: truncated: only {path.stat().st_size} bytes")
            self._data = np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        cursor = _Cursor(self._data, path)
        magic = bytes(self._data[:4])
        if magic != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file: it starts with {magic!r}")
        cursor.position = 4
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{path}: GGUF version {version}; supported: 2 and 3, little endian"
            )
        num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        headers = [self._tensor_header(cursor) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{path}: general.alignment is {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        self.tensors = {
            name: self._locate(name, shape, kind, start + offset)
            for name, shape, kind, offset in headers
        }

    @staticmethod
    def _tensor_header(cursor: _Cursor) -> tuple[str, Shape, int, int]:
        name = cursor.string()
        innermost_first = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
        return name, tuple(reversed(innermost_first)), cursor.scalar("I"), cursor.scalar("Q")

    def _locate(self, name: str, shape: Shape, kind: int, offset: int) -> TensorInfo:
        try:
            known = gguf.GGMLQuantizationType(kind)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: tensor {name} has unknown type {kind}") from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[known]
        width = shape[-1] if shape else 1
        if not shape or not all(shape) or width % block:
            raise CheckpointError(
                f"{self.path}: tensor {name} {list(shape)} cannot be {known.name}"
            )
        info = TensorInfo(shape, known, offset, width // block * block_bytes)
        missing = info.offset + info.num_bytes - len(self._data)
        if missing > 0:
            raise CheckpointError(
                f"{self.path}: truncated: tensor {name} ends {missing} bytes after the file's end"
            )
        return info

    def shapes(self) -> dict[str, Shape]:
        """All tensors and their shapes."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in bfloat16 if it is stored in that type, otherwise dequantized to float32.

        Raises:
          CheckpointError: the `gguf` package cannot dequantize the type.
        """
        info = self.tensors[name]
        stored = self._data[info.offset : info.offset + info.num_bytes]
        if info.kind == gguf.GGMLQuantizationType.BF16:
            return stored.view(ml_dtypes.bfloat16).reshape(info.shape).copy()
        rows = stored.reshape(info.rows, info.bytes_per_row)
        values = np.empty((info.rows, info.shape[-1]), np.float32)
        rows_per_chunk = max(1, _CHUNK_VALUES // info.shape[-1])
        for first in range(0, info.rows, rows_per_chunk):
            chunk = slice(first, first + rows_per_chunk)
            try:
                values[chunk] = gguf.quants.dequantize(np.asarray(rows[chunk]), info.kind)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{self.path}: tensor {name}: cannot dequantize {info.kind.name}"
                ) from error
        return values.reshape(info.shape)
