"""When new sequences may begin beside those that decode. A token is due every 20 ms."""

from __future__ import annotations

import pytest

from muxjax.scheduling.policies.slo_tracker import SloTracker
from muxjax.scheduling.policies.slo_tuning import DEFAULT_TUNING
from muxjax.scheduling.policies.slo_utilization import SloUtilization
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import LatencySlo
from tests.muxjax.scheduling.harness import Loop, request, spec

TARGETS = LatencySlo(scale=2.0, isolated_ttft=0.01, isolated_tpot=0.01)


def decoding(**running: int) -> Scheduler:
    """A scheduler of two models with this many decoding sequences."""
    specs = [
        spec(name, 1, 16, 512, max_seqs=16, prefill_seqs=8, prefill_tokens=64, targets=TARGETS)
        for name in "ab"
    ]
    loop = Loop.of(specs, 2000, "fcfs")
    number = 0
    for name, count in running.items():
        for _ in range(count):
            loop.unit.add(request(number, name, 4, 200))
            number += 1
    for _ in range(50):
        loop.turn()
    unit = loop.unit
    assert {name: len(unit.models[name].running) for name in running} == running
    return unit


def step_times(unit: Scheduler, model: str, **seconds: float) -> None:
    """Sets what a decode step takes: `of8=0.01` is for 5 to 8 sequences."""
    del unit.estimates._decode[model]
    unit.estimates.add_model(model)
    for size, value in seconds.items():
        unit.estimates.observe_decode(model, int(size[2:]), 1, value)


def utilization_of(
    unit: Scheduler, now: float = 0.0
) -> tuple[SloUtilization, dict[str, SloTracker]]:
    """The utilization with the current step times."""
    trackers = {name: SloTracker(state, unit.estimates) for name, state in unit.models.items()}
    utilization = SloUtilization()
    utilization.update(trackers, unit, now)
    return utilization, trackers


def test_any_model_may_begin_if_none_decodes() -> None:
    unit = decoding()
    step_times(unit, "a", of1=1.0)
    utilization, trackers = utilization_of(unit)
    assert utilization.total == 0
    assert utilization.allows(trackers["a"], unit, 8)


def test_a_model_may_begin_while_all_keep_their_targets() -> None:
    unit = decoding(a=4, b=1)
    step_times(unit, "a", of4=0.005)
    step_times(unit, "b", of1=0.004, of2=0.005, of8=0.017)
    utilization, trackers = utilization_of(unit)
    assert utilization.total == pytest.approx(0.45)
    assert utilization.allows(trackers["b"], unit, 1)  # 0.25 + 0.25
    assert not utilization.allows(trackers["b"], unit, 7)  # 0.25 + 0.85


def test_sequences_without_extra_cost_may_always_begin() -> None:
    unit = decoding(a=4, b=4)
    step_times(unit, "a", of1=0.004, of4=0.012, of8=0.0122, of16=0.019)
    step_times(unit, "b", of1=0.004, of4=0.012)
    utilization, trackers = utilization_of(unit)
    assert utilization.total == pytest.approx(1.2)
    assert utilization.allows(trackers["a"], unit, 4)
    assert not utilization.allows(trackers["a"], unit, 5)


def test_a_batch_that_just_reached_a_bucket_may_grow() -> None:
    unit = decoding(a=9, b=4)
    step_times(unit, "a", of1=0.004, of8=0.012, of16=0.019)
    step_times(unit, "b", of1=0.004, of4=0.012)
    utilization, trackers = utilization_of(unit)
    assert not utilization.allows(trackers["a"], unit, 1)


def test_a_model_without_sequences_begins_unless_it_is_ahead_of_its_share() -> None:
    unit = decoding(a=8)
    step_times(unit, "a", of8=0.019)
    step_times(unit, "b", of1=0.004, of2=0.012)
    utilization, trackers = utilization_of(unit)
    assert utilization.allows(trackers["b"], unit, 2)
    unit.fair_share.charge(("b", "decode"), 10.0)
    assert utilization.allows(trackers["b"], unit, 1)  # 0.2 of 0.5: half of all decodes
    assert not utilization.allows(trackers["b"], unit, 2)


def test_models_with_tight_targets_do_not_wait() -> None:
    unit = decoding(a=8)
    step_times(unit, "a", of8=0.019)
    step_times(unit, "b", of1=0.0075)
    utilization, trackers = utilization_of(unit)
    assert utilization.allows(trackers["b"], unit, 1)


def test_prefills_leave_less_time() -> None:
    unit = decoding(a=4, b=1)
    step_times(unit, "a", of4=0.005)
    step_times(unit, "b", of1=0.004, of4=0.013)
    unit.fair_share.used = dict.fromkeys(unit.fair_share.used, 0.0)
    unit.fair_share.used["a", "prefill"], unit.fair_share.used["b", "decode"] = 6.0, 4.0
    utilization, trackers = utilization_of(unit)
    assert 1 - DEFAULT_TUNING.measure_weight * 0.6 < 0.25 + 0.65 < 1
    assert not utilization.allows(trackers["b"], unit, 3)
    # Old prefills lose their weight.
    for second in range(1, 20):
        unit.fair_share.used["b", "decode"] += 1.0
        utilization.update(trackers, unit, float(second))
    assert utilization.allows(trackers["b"], unit, 3)


def test_prefills_and_an_earlier_pace_leave_less_room() -> None:
    unit = decoding(a=4, b=1)
    step_times(unit, "a", of4=0.010)
    step_times(unit, "b", of1=0.009)
    utilization, trackers = utilization_of(unit)
    assert utilization.total == pytest.approx(0.95)
    assert utilization.leaves_room(0.98)
    assert not utilization.leaves_room(0.9)
    unit.fair_share.used = dict.fromkeys(unit.fair_share.used, 0.0)
    unit.fair_share.used["a", "prefill"], unit.fair_share.used["b", "decode"] = 2.0, 8.0
    utilization.update(trackers, unit, 1.0)
    assert not utilization.leaves_room(0.98)  # 0.98 x (1 - 0.3 x 0.2)
