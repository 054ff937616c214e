"""The units of a plan: devices, quotas, fractions of time, and attainment."""

from __future__ import annotations

import pytest

from muxjax.placement.planner.load import ModelLoad
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.specs import LatencySlo
from tests.placement.fleets import SHAPES
from tests.placement.planner.harness import plan_of

KIND = next(iter(SHAPES))


def test_units_have_separate_devices() -> None:
    loads = [ModelLoad(name, KIND, ExpectedLoad(2.0)) for name in ("a", "b", "c")]
    plan = plan_of(loads, "1x4:a100-80gb")
    devices = [(unit.node, device) for unit in plan.units for device in unit.devices]
    assert len(set(devices)) == len(devices)
    assert all(0 <= device < 4 for _, device in devices)


def test_quotas_are_proportional_to_rates_and_at_least_the_floors() -> None:
    loads = [
        ModelLoad("popular", KIND, ExpectedLoad(9.0)),
        ModelLoad("rare", KIND, ExpectedLoad(1.0)),
    ]
    (unit,) = plan_of(loads, "1x1:a100-80gb").units
    popular, rare = sorted(unit.models, key=lambda model: -model.rate)
    assert popular.kv_quota > rare.kv_quota
    assert popular.kv_quota + rare.kv_quota == pytest.approx(1.0)
    for model in unit.models:
        assert 0 < model.kv_floor <= model.kv_quota


def test_time_fractions_add_up_to_at_most_1() -> None:
    (unit,) = plan_of(
        [ModelLoad("a", KIND, ExpectedLoad(2.0)), ModelLoad("b", KIND, ExpectedLoad(2.0))],
        "1x1:h100",
    ).units
    assert sum(model.prefill_time + model.decode_time for model in unit.models) <= 1 + 1e-6


def test_attainment_counts_models_within_their_targets() -> None:
    loads = [
        ModelLoad("late", KIND, ExpectedLoad(1.0), slo=LatencySlo(ttft=1e-9)),
        ModelLoad("in-time", KIND, ExpectedLoad(3.0), slo=LatencySlo(ttft=60.0)),
    ]
    assert plan_of(loads, "1x2:h100").slo_attainment == pytest.approx(0.75)


def test_the_hash_depends_on_the_loads() -> None:
    hashes = {
        plan_of([ModelLoad("a", KIND, ExpectedLoad(rate))], "1x1:h100").config_hash
        for rate in (1.0, 2.0)
    }
    assert len(hashes) == 2
