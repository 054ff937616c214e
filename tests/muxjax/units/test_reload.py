"""Differences between a running fleet and a new fleet file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from muxjax.config.fleet_file import load_fleet_config
from muxjax.errors import FleetConfigError
from muxjax.units.reload import diff_fleet
from tests.muxjax.tiny_fleets import entry
from tests.muxjax.units.harness import EXTRA, FILE, changed


def test_changes_are_grouped_by_kind() -> None:
    def diff(file: dict[str, Any]) -> Callable[[str], tuple[str, ...]]:
        config = load_fleet_config(FILE)
        entries = {model.name: model for model in config.models}
        changes = diff_fleet(config, entries, load_fleet_config(file))
        return lambda kind: getattr(changes, kind)

    same = diff({**FILE, "idle_timeout": 60.0, "cluster": "1x1:h100"})
    assert [same(kind) for kind in ("added", "removed", "replaced", "changed")] == [()] * 4
    some = diff(changed(llama=None, qwen3=entry("qwen3", dtype="bfloat16"), extra=EXTRA))
    assert (some("added"), some("removed"), some("replaced")) == (
        ("extra",),
        ("llama",),
        ("qwen3",),
    )
    assert diff(changed(llama=entry("llama", rate=9.0, pinned=True)))("changed") == ("llama",)
    with pytest.raises(FleetConfigError, match=r"policy: restart.*\nengine: restart"):
        diff({**FILE, "policy": "slo", "engine": {}})
