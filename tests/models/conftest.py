"""Demo checkpoints, opened once; downloaded from the package indexes if not cached."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import pytest

from muxjax.cache import cache_folder
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.checkpoints.loading import open_checkpoint
from muxjax.models.download.demo_models import DEMO_MODELS


@functools.cache
def _open(name: str) -> Checkpoint:
    return open_checkpoint(f"demo:{name}", progress=False)


@pytest.fixture(scope="session")
def demo_checkpoint() -> Callable[[str], Checkpoint]:
    """Opens a demo model by name; skips the test if it needs npm and npm is missing."""

    def open_demo(name: str) -> Checkpoint:
        cached = (cache_folder() / "demo" / name).is_dir()
        needs_npm = any(archive.index == "npm" for archive in DEMO_MODELS[name].archives)
        if needs_npm and not cached and shutil.which("npm") is None:
            pytest.skip(f"{name} is not cached, and downloading it needs npm")
        return _open(name)

    return open_demo
