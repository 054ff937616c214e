"""Reading of JSON files, and errors for invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from muxjax.errors import CheckpointError
from muxjax.models.json_files import read_json


def test_read_json_accepts_objects_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    for text, message in (("{", "not JSON"), ("[1]", "not a JSON object")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_json(path)
    path.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_json(path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_json(tmp_path / "none.json")
