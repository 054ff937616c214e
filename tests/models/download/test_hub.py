"""Downloads from the Hub, with `huggingface_hub` replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from muxjax.errors import DownloadError
from muxjax.models.download.hub import fetch_from_hub


def test_repository_revision_and_files_are_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[tuple[str, dict[str, Any]]] = []

    def snapshot(repository: str, **options: Any) -> str:
        requests.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert fetch_from_hub("org/name@abc", progress=False) == tmp_path
    fetch_from_hub("org/name")
    assert [(name, options["revision"]) for name, options in requests] == [
        ("org/name", "abc"),
        ("org/name", None),
    ]
    assert "*.safetensors" in requests[0][1]["allow_patterns"]


def test_missing_network_raises_download_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repository: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(DownloadError, match="org/name: not a local path, and cannot be downloaded"):
        fetch_from_hub("org/name")
