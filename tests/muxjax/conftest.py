"""A session of tiny models that all benchmark tests share, because its compilation is slow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from muxjax.bench.session import BenchSession
from muxjax.config.fleet_file import load_fleet_config
from tests.muxjax.tiny_fleets import fleet

TINY_FLEET = fleet("llama", "qwen3", memory="4MB")
for _entry in TINY_FLEET["models"]:
    _entry |= {"prompt_tokens": 8, "output_tokens": 4}


@pytest.fixture(scope="session")
def session() -> Iterator[BenchSession]:
    with BenchSession.load(load_fleet_config(TINY_FLEET), progress=False) as session:
        yield session
