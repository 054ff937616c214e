"""JSON files of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from muxjax.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
      CheckpointError: the file cannot be read, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value
