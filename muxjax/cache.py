"""The folder for downloads and compiled programs on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns `$MUXJAX_CACHE`, or `muxjax` in the user's cache folder."""
    chosen = os.environ.get("MUXJAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muxjax"
