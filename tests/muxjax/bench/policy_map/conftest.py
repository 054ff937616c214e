"""Benchmarks are scripts: they find each other in their own folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _map_fleet


@pytest.fixture
def three_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of three models on four devices, which is soon done."""
    monkeypatch.setattr(_map_fleet, "KINDS", ("llama-7b", "llama-7b", "llama-13b"))
    monkeypatch.setattr(_map_fleet, "OUTPUT_TOKENS", 15.0)
    monkeypatch.setattr(_map_fleet, "LONGEST", 256)
    monkeypatch.setitem(_map_fleet.CLUSTERS, "h200", "1x4:h200")  # type: ignore[arg-type]  # a dict
