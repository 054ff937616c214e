from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from muxjax.errors import PlanError
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import load_plan
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.planner.harness import plan_of


def save_plan(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    path = tmp_path / "plan.json"
    plan_of([ModelLoad("a", "llama3-8b", ExpectedLoad(2.0))], "1x2:h100").save(path)
    return path, json.loads(path.read_text())


def test_a_saved_plan_can_be_loaded(tmp_path: Path) -> None:
    path, data = save_plan(tmp_path)
    plan = load_plan(path)
    assert plan.to_json() == data
    assert plan.version == 1
    assert plan.shapes["llama3-8b"].num_kv_heads == 8
    assert set(data) >= {"seed", "config_hash", "muxjax", "units", "score", "bound", "seconds"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this MuxJAX reads version 1"),
        ({"units": 3}, "units"),
        ({"surplus": 1}, "surplus: Extra inputs"),
        ({"score": float("nan")}, "score"),
        ({"shapes": {}}, "the shape of llama3-8b"),
    ],
)
def test_an_invalid_plan_raises(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path, data = save_plan(tmp_path)
    path.write_text(json.dumps(data | change))
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(path)
    assert str(path) in str(caught.value)


def test_units_with_shared_or_missing_devices_raise(tmp_path: Path) -> None:
    path, data = save_plan(tmp_path)
    unit = data["units"][0]
    path.write_text(json.dumps(data | {"units": [unit, unit | {"name": "other"}]}))
    with pytest.raises(PlanError, match="another unit uses"):
        load_plan(path)
    path.write_text(json.dumps(data | {"units": [unit | {"node": 5}]}))
    with pytest.raises(PlanError, match="devices that the cluster does not have"):
        load_plan(path)


def test_an_unreadable_file_raises(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        load_plan(tmp_path / "none.json")
    path = tmp_path / "plan.json"
    path.write_text("{")
    with pytest.raises(PlanError, match="not a plan"):
        load_plan(path)
