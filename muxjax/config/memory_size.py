"""Memory sizes in configuration: `512MB`, `1.5 GiB`. Imports no JAX."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_memory(value: object) -> int:
    """Returns the bytes of a size: `1GB`, `512MiB`, `1.5 GB` or a number of bytes.

    Raises:
      ValueError: `value` is not a size, or is below one byte.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _MEMORY.fullmatch(value) if isinstance(value, str) else None
    unit = _UNITS.get(match[2].lower()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ValueError("must be a size such as 1GB, 512MiB or a number of bytes")
    return size


def format_memory(num_bytes: int) -> str:
    """Formats a size, such as `1.5 GB` or `12.0 MB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _memory(value: object) -> object:
    if value is None:
        return None
    try:
        return parse_memory(value)
    except ValueError as error:
        raise PydanticCustomError("memory", str(error)) from error


Memory = Annotated[
    int,
    BeforeValidator(_memory),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*([kKmMgGtT]?[iI]?[bB])?\s*$"},
            ]
        }
    ),
]
