"""Paths of the shared data; tests are skipped without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


def shared_data() -> Path:
    """The folder of profiles and traces that are not part of the project."""
    folder = Path(os.environ.get("MUXJAX_SHARED_DATA") or _ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set MUXJAX_SHARED_DATA")
    return folder


def a100_profile() -> Path:
    """MuxServe's profile of LLaMA on A100s."""
    return shared_data() / "muxserve_a100_profile.json"
