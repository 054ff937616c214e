"""The fake fleet and its fleet files."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from tests.muxjax.cli.harness import CliFleet


@pytest.fixture
def fake_fleet(monkeypatch: pytest.MonkeyPatch) -> type[CliFleet]:
    module = types.ModuleType("muxjax.fleet")
    module.Fleet = CliFleet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "muxjax.fleet", module)
    monkeypatch.setattr(CliFleet, "calls", [])
    monkeypatch.setattr(CliFleet, "fault", None)
    return CliFleet


@pytest.fixture
def one(tmp_path: Path) -> str:
    path = tmp_path / "one.yaml"
    path.write_text("models: [{name: chat, source: org/chat}]")
    return str(path)


@pytest.fixture
def two(tmp_path: Path) -> str:
    path = tmp_path / "two.yaml"
    path.write_text("models: [{name: chat, source: org/a}, {name: base, source: org/b}]")
    return str(path)
