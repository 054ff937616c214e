import jax
import pytest

from muxjax.config.fleet_file import load_fleet_config
from muxjax.errors import FleetConfigError, PlanError
from muxjax.scheduling.demand import expected_demand
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.routing import PlannedLoad
from muxjax.scheduling.specs import ModelSpec
from muxjax.units.planned_units import split_by_plan
from tests.muxjax.on_eight_devices import UNITS, make_plan, planned_fleet

ONE_DEVICE = jax.devices()[:1]


def config(**changes):
    return load_fleet_config({**planned_fleet(), **changes})


def test_each_unit_has_a_fleet_config():
    parts = {part.name: part for part in split_by_plan(config(), make_plan(), ONE_DEVICE * 4)}
    assert list(parts) == list(UNITS)
    wide = parts["wide"].config
    assert [(m.name, m.tensor_parallel) for m in wide.models] == [("one", 2), ("two", 1)]
    assert wide.tensor_parallel == len(parts["wide"].devices) == 2
    assert {m.kv_floor for m in wide.models} == {0.125}
    # Six megabytes are divided among four devices.
    assert [part.config.pool.memory for part in parts.values()] == [3_000_000, 1_500_000, 1_500_000]
    load = parts["left"].planned_load
    assert load.token_seconds == {"three": pytest.approx(2.0 / 24), "four": pytest.approx(2.0 / 24)}
    assert load.outstanding == pytest.approx(2 * 2.0 * 2.0)


def test_planned_pools_are_used_without_pool_memory():
    parts = split_by_plan(config(pool={}), make_plan(), ONE_DEVICE * 4)
    assert [part.config.pool.memory for part in parts] == [2_000_000, 1_000_000, 1_000_000]


def test_demand_is_the_planned_demand():
    part = split_by_plan(config(), make_plan(), ONE_DEVICE * 4)[0]
    spec = ModelSpec("one", 2, 8, 64)
    demand = part.demand([spec], StepEstimates(["one"]))["one"]
    assert (demand.kv, demand.prefill_seconds, demand.decode_seconds) == (0.5, 0.1, 0.1)


def test_demand_missing_from_the_plan_is_estimated():
    plan = make_plan()
    bare = [
        unit.model_copy(
            update={
                "models": tuple(
                    model.model_copy(
                        update=dict.fromkeys(
                            ("kv_quota", "prefill_time", "decode_time", "batch"), 0.0
                        )
                    )
                    for model in unit.models
                )
            }
        )
        for unit in plan.units
    ]
    part = split_by_plan(config(), plan.model_copy(update={"units": tuple(bare)}), ONE_DEVICE * 4)[
        0
    ]
    spec, estimates = ModelSpec("one", 2, 8, 64), StepEstimates(["one"])
    assert part.demand([spec], estimates) == expected_demand([spec], estimates)
    assert part.planned_load == PlannedLoad({"one": 1.0, "two": 1.0})


def test_plan_for_other_models_is_rejected():
    plan, fleet = make_plan(), planned_fleet()
    added = {**fleet["models"][0], "name": "six"}
    with pytest.raises(PlanError, match="does not place six: update it"):
        split_by_plan(config(models=[*fleet["models"], added]), plan, ONE_DEVICE * 4)
    with pytest.raises(PlanError, match="places five, which the fleet file does not have"):
        split_by_plan(config(models=fleet["models"][:-1]), plan, ONE_DEVICE * 4)


def test_plan_for_more_devices_is_rejected():
    with pytest.raises(PlanError, match=r"unit wide .* device 2 .* sees 1 \(cpu\); .*count=2"):
        split_by_plan(config(), make_plan(), ONE_DEVICE)


def test_tensor_parallel_is_rejected_with_a_plan():
    with pytest.raises(FleetConfigError, match="a plan sets the number of devices"):
        split_by_plan(config(tensor_parallel=2), make_plan(), ONE_DEVICE * 4)
