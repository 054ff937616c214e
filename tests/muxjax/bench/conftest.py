"""One rig of tiny models for all tests of this folder: compiling it takes longer than most."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from muxjax.bench.rig import Rig
from muxjax.config import load_fleet_config
from tests.muxjax.tiny_fleets import fleet


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    with Rig.load(load_fleet_config(fleet("llama", "qwen3", memory="4MB")), progress=False) as rig:
        yield rig
