"""Fixture with a small map."""

from __future__ import annotations

import pytest

from muxjax.bench.policy_map import scenario


@pytest.fixture
def three_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of three models on four devices, which is quick to simulate."""
    monkeypatch.setattr(scenario, "KINDS", ("llama-7b", "llama-7b", "llama-13b"))
    monkeypatch.setattr(scenario, "OUTPUT_TOKENS", 15.0)
    monkeypatch.setattr(scenario, "LONGEST", 256)
    monkeypatch.setitem(scenario.CLUSTERS, "h200", "1x4:h200")  # type: ignore[arg-type]  # a dict
