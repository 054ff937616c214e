"""A unit in this process, with two tiny models: models that change while its engine runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from muxjax.config.fleet_file import load_fleet_config
from muxjax.config.model_entry import ModelEntry
from muxjax.errors import EngineDead, PoolTooSmall
from muxjax.scheduling.scheduler import Scheduler
from muxjax.testing.mock_executor import MockExecutor
from muxjax.units.build import build_unit
from muxjax.units.build_unit_spec import build_added_model_spec, build_unit_spec
from muxjax.units.local_unit import LocalUnit
from muxjax.units.unit_spec import UnitSpec
from tests.muxjax.engine.harness import WAIT, Collector
from tests.muxjax.scheduling.harness import request
from tests.muxjax.tiny_fleets import entry
from tests.muxjax.units.harness import EXTRA, FILE


def build_spec() -> UnitSpec:
    return build_unit_spec(load_fleet_config(FILE), progress=False)


def entry_of(unit: LocalUnit, name: str, **settings: Any) -> ModelEntry:
    return unit.spec.model_specs[name].entry.model_copy(update=settings)


def scheduled_models(unit: LocalUnit) -> set[str]:
    return unit.engine.call(lambda scheduler: set(scheduler.models))


def generate(unit: LocalUnit, model: str) -> list[int]:
    collector = Collector()
    unit.engine.submit(request(0, model, 5, 6), collector)
    assert collector.done.wait(WAIT)
    assert collector.error is None
    return collector.tokens


@pytest.fixture(scope="module")
def shared() -> Iterator[LocalUnit]:
    unit = build_unit(build_spec())
    yield unit
    unit.close()


@pytest.fixture
def unit(shared: LocalUnit) -> Iterator[LocalUnit]:
    """The shared unit; after each test its two models are awake again."""
    yield shared
    shared.revive()
    for name in shared.models:
        if not shared.is_awake(name):
            shared.activate(name)
    assert scheduled_models(shared) == {"llama", "qwen3"}


def test_deactivated_model_has_no_quota_until_it_is_activated(unit: LocalUnit) -> None:
    tokens, weight_bytes = generate(unit, "llama"), unit.weight_bytes
    unit.deactivate("llama")
    assert not unit.is_awake("llama")
    assert scheduled_models(unit) == {"qwen3"}
    assert unit.weight_bytes == weight_bytes - unit.models["llama"].param_bytes
    assert set(unit.models) == {"llama", "qwen3"}
    unit.activate("llama")
    assert unit.is_awake("llama")
    assert generate(unit, "llama") == tokens


def test_restart_keeps_models_asleep(unit: LocalUnit) -> None:
    unit.deactivate("llama")
    restarts = unit.restarts
    unit.restart("test")
    assert unit.restarts == restarts + 1
    assert scheduled_models(unit) == {"qwen3"}


def test_change_without_a_running_engine_applies_to_the_next_engine(unit: LocalUnit) -> None:
    unit.engine.abandon("test")
    unit.deactivate("qwen3")
    unit.revive()
    assert scheduled_models(unit) == {"llama"}


def test_failed_activation_leaves_the_model_asleep(
    unit: LocalUnit, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit.deactivate("llama")

    def refuse(scheduler: Scheduler, spec: object) -> None:
        raise PoolTooSmall("no room")

    monkeypatch.setattr(Scheduler, "add_model", refuse)
    with pytest.raises(PoolTooSmall, match="no room"):
        unit.activate("llama")
    assert not unit.is_awake("llama")
    monkeypatch.undo()


def test_register_adds_a_sleeping_model_and_unregister_removes_it(unit: LocalUnit) -> None:
    spec = build_added_model_spec(unit.spec, ModelEntry.model_validate(EXTRA))
    unit.check_fits(spec)
    programs = unit.programs["qwen3"]  # a model of the same shape
    unit.register(spec, programs)
    assert unit.model_names == {"llama", "qwen3", "extra"}
    assert not unit.is_awake("extra")
    assert scheduled_models(unit) == {"llama", "qwen3"}
    assert unit.unregister("extra") is programs
    assert unit.model_names == set(unit.models) == {"llama", "qwen3"}


def test_check_fits_rejects_a_block_that_the_pool_layout_cannot_hold(unit: LocalUnit) -> None:
    spec = build_added_model_spec(unit.spec, ModelEntry.model_validate(entry("gemma3")))
    with pytest.raises(ValueError, match="block of gemma3"):
        unit.check_fits(spec)
    assert scheduled_models(unit) == {"llama", "qwen3"}


def test_update_expectations_changes_the_running_scheduler(unit: LocalUnit) -> None:
    spec = unit.spec.model_specs["llama"]
    unit.update_expectations([spec.update_expectations(entry_of(unit, "llama", rate=7.0))])
    rate = unit.engine.call(lambda scheduler: scheduler.models["llama"].spec.load.rate)
    assert rate == unit.spec.model_specs["llama"].spec.load.rate == 7.0
    too_large = spec.update_expectations(entry_of(unit, "llama", kv_floor=1.0))
    with pytest.raises(PoolTooSmall):
        unit.update_expectations([too_large])
    assert unit.spec.model_specs["llama"].spec.kv_floor is None


def test_stats_contain_the_programs_and_the_pool(unit: LocalUnit) -> None:
    stats = unit.stats()
    assert {program["model"] for program in stats["programs"]} == {"llama", "qwen3"}
    assert stats["pool_bytes"] == unit.spec.pool_bytes
    assert set(stats["models"]) == {"llama", "qwen3"}
    assert set(unit.state()["models"]) == {"llama", "qwen3"}


def test_unit_without_programs_has_no_engine() -> None:
    unit = LocalUnit("0", build_spec(), {})
    assert not unit.alive
    with pytest.raises(EngineDead, match="warm_up=False"):
        _ = unit.engine
    assert unit.stats()["programs"] == []
    unit.close()


def test_models_are_fixed_with_an_executor_factory() -> None:
    spec = build_spec()
    specs = [model.spec for model in spec.model_specs.values()]
    unit = LocalUnit(
        "0", spec, {}, executor_factory=lambda programs: MockExecutor(specs, spec.kv.shape[0])
    )
    assert not unit.can_change_models
    assert unit.alive
    assert len(generate(unit, "llama")) == 6
    unit.close()
