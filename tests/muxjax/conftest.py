"""One rig of tiny models for all benchmark tests: compiling it takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from muxjax.bench.session import BenchSession
from muxjax.config.fleet_file import load_fleet_config
from tests.muxjax.tiny_fleets import fleet

RIG = fleet("llama", "qwen3", memory="4MB")
for _entry in RIG["models"]:
    _entry |= {"prompt_tokens": 8, "output_tokens": 4}


@pytest.fixture(scope="session")
def rig() -> Iterator[BenchSession]:
    with BenchSession.load(load_fleet_config(RIG), progress=False) as rig:
        yield rig
