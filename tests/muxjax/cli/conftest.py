"""The fake fleet with its fleet files, and the command line on a fleet of tiny models."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from muxjax.bench.session import BenchSession
from muxjax.config.fleet_file import load_fleet_config
from tests.muxjax.cli.bench_cli import BenchCli
from tests.muxjax.cli.harness import CliFleet
from tests.muxjax.conftest import TINY_FLEET


@pytest.fixture
def fake_fleet(monkeypatch: pytest.MonkeyPatch) -> type[CliFleet]:
    module = types.ModuleType("muxjax.fleet")
    module.Fleet = CliFleet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "muxjax.fleet", module)
    monkeypatch.setattr(CliFleet, "calls", [])
    monkeypatch.setattr(CliFleet, "fault", None)
    return CliFleet


@pytest.fixture
def single_model(tmp_path: Path) -> str:
    path = tmp_path / "single.yaml"
    path.write_text("models: [{name: chat, source: org/chat}]")
    return str(path)


@pytest.fixture
def two_models(tmp_path: Path) -> str:
    path = tmp_path / "two.yaml"
    path.write_text("models: [{name: chat, source: org/a}, {name: base, source: org/b}]")
    return str(path)


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, session: BenchSession
) -> BenchCli:
    """The command line; the fleet of tiny models is loaded once for all tests."""

    @contextmanager
    def load(config: object) -> Iterator[BenchSession]:
        assert config == load_fleet_config(TINY_FLEET)
        yield session

    monkeypatch.setattr(BenchSession, "load", load)
    return BenchCli(tmp_path, monkeypatch, capsys)


@pytest.fixture(autouse=True)
def _short_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are simulated briefly: the type checks of the tests make simulations slow."""
    simulator = "muxjax.placement.simulator"
    monkeypatch.setattr(f"{simulator}.fleet_plan.SECONDS", 5.0)
    monkeypatch.setattr(f"{simulator}.fleet_plan.MIN_SECONDS", 1.0)
    monkeypatch.setattr(f"{simulator}.fleet_plan.MIN_REQUESTS", 20)
    monkeypatch.setattr(f"{simulator}.fleet_plan.MAX_REQUESTS", 200)
    monkeypatch.setattr(f"{simulator}.guided_search.SIMULATED_REQUESTS", 200)
    monkeypatch.setattr(f"{simulator}.guided_search.MAX_STEPS", 20)
    monkeypatch.setattr(f"{simulator}.group_attainment.MIN_SECONDS", 2.0)
    monkeypatch.setattr(f"{simulator}.group_attainment.MAX_SECONDS", 5.0)
    monkeypatch.setattr(f"{simulator}.group_attainment.GROUP_REQUESTS", 20)
