"""Benchmarks are scripts: they find each other in their own folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from muxjax.bench.policy_map import scenario


@pytest.fixture
def three_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of three models on four devices, which is soon done."""
    monkeypatch.setattr(scenario, "KINDS", ("llama-7b", "llama-7b", "llama-13b"))
    monkeypatch.setattr(scenario, "OUTPUT_TOKENS", 15.0)
    monkeypatch.setattr(scenario, "LONGEST", 256)
    monkeypatch.setitem(scenario.CLUSTERS, "h200", "1x4:h200")  # type: ignore[arg-type]  # a dict
