"""Reads fields of trace files, with errors that name the position in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from muxjax.errors import WorkloadError


def open_text(path: Path) -> Any:
    """Opens a UTF-8 file, with or without a byte order mark.

    Raises:
      WorkloadError: the file cannot be read.
    """
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror or error}") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      WorkloadError: the file cannot be read or is not JSON.
    """
    with open_text(path) as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise WorkloadError(f"{path}: not JSON: {error}") from error


def parse_json_object(line: str, where: str) -> dict[str, Any]:
    """Parses a line of a JSONL file.

    Raises:
      WorkloadError: the line is not a JSON object; the message names the position `where`.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise WorkloadError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise WorkloadError(f"{where}: a line must be a JSON object, not {line.strip()[:40]!r}")
    return row


def number_field(row: dict[str, Any], key: str, where: str) -> float:
    """The value of a field as a float.

    Raises:
      WorkloadError: a missing field, or a value that is not a number.
    """
    if key not in row:
        raise WorkloadError(f"{where}: {key} is missing")
    try:
        return float(row[key])
    except (TypeError, ValueError) as error:
        raise WorkloadError(f"{where}: {key} must be a number, not {row[key]!r}") from error


def integer_field(row: dict[str, Any], key: str, where: str) -> int:
    """The value of a field as an integer; `2.0` is valid.

    Raises:
      WorkloadError: a missing field, or a value that is not an integer.
    """
    value = number_field(row, key, where)
    if value != value or value in (float("inf"), float("-inf")) or value != int(value):
        raise WorkloadError(f"{where}: {key} must be an integer, not {row[key]!r}")
    return int(value)
