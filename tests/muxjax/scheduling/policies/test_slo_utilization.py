"""Conditions for new sequences to begin beside decoding ones. A token is due every 20 ms."""

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
    loop = Loop.create(specs, 2000, "fcfs")
    number = 0
    for name, count in running.items():
        for _ in range(count):
            loop.scheduler.add(request(number, name, 4, 200))
            number += 1
    for _ in range(50):
        loop.turn()
    scheduler = loop.scheduler
    assert {name: len(scheduler.models[name].running) for name in running} == running
    return scheduler


def set_step_times(scheduler: Scheduler, model: str, **seconds: float) -> None:
    """Sets the duration of decode steps: `of8=0.01` is for 5 to 8 sequences."""
    del scheduler.estimates._decode[model]
    scheduler.estimates.add_model(model)
    for size, value in seconds.items():
        scheduler.estimates.observe_decode(model, int(size[2:]), 1, value)


def utilization_of(
    scheduler: Scheduler, now: float = 0.0
) -> tuple[SloUtilization, dict[str, SloTracker]]:
    """The utilization with the current step times."""
    trackers = {
        name: SloTracker(state, scheduler.estimates) for name, state in scheduler.models.items()
    }
    utilization = SloUtilization()
    utilization.update(trackers, scheduler, now)
    return utilization, trackers


def test_any_model_may_begin_if_none_decodes() -> None:
    scheduler = decoding()
    set_step_times(scheduler, "a", of1=1.0)
    utilization, trackers = utilization_of(scheduler)
    assert utilization.total == 0
    assert utilization.allows(trackers["a"], scheduler, 8)


def test_a_model_may_begin_while_all_keep_their_targets() -> None:
    scheduler = decoding(a=4, b=1)
    set_step_times(scheduler, "a", of4=0.005)
    set_step_times(scheduler, "b", of1=0.004, of2=0.005, of8=0.017)
    utilization, trackers = utilization_of(scheduler)
    assert utilization.total == pytest.approx(0.45)
    assert utilization.allows(trackers["b"], scheduler, 1)  # 0.25 + 0.25
    assert not utilization.allows(trackers["b"], scheduler, 7)  # 0.25 + 0.85


def test_sequences_without_extra_cost_may_always_begin() -> None:
    scheduler = decoding(a=4, b=4)
    set_step_times(scheduler, "a", of1=0.004, of4=0.012, of8=0.0122, of16=0.019)
    set_step_times(scheduler, "b", of1=0.004, of4=0.012)
    utilization, trackers = utilization_of(scheduler)
    assert utilization.total == pytest.approx(1.2)
    assert utilization.allows(trackers["a"], scheduler, 4)
    assert not utilization.allows(trackers["a"], scheduler, 5)


def test_a_batch_that_just_reached_a_bucket_may_grow() -> None:
    scheduler = decoding(a=9, b=4)
    set_step_times(scheduler, "a", of1=0.004, of8=0.012, of16=0.019)
    set_step_times(scheduler, "b", of1=0.004, of4=0.012)
    utilization, trackers = utilization_of(scheduler)
    assert not utilization.allows(trackers["a"], scheduler, 1)


def test_a_model_without_sequences_begins_unless_it_is_ahead_of_its_share() -> None:
    scheduler = decoding(a=8)
    set_step_times(scheduler, "a", of8=0.019)
    set_step_times(scheduler, "b", of1=0.004, of2=0.012)
    utilization, trackers = utilization_of(scheduler)
    assert utilization.allows(trackers["b"], scheduler, 2)
    scheduler.fair_share.charge(("b", "decode"), 10.0)
    assert utilization.allows(trackers["b"], scheduler, 1)  # 0.2 of 0.5: half of all decodes
    assert not utilization.allows(trackers["b"], scheduler, 2)


def test_models_with_tight_targets_do_not_wait() -> None:
    scheduler = decoding(a=8)
    set_step_times(scheduler, "a", of8=0.019)
    set_step_times(scheduler, "b", of1=0.0075)
    utilization, trackers = utilization_of(scheduler)
    assert utilization.allows(trackers["b"], scheduler, 1)


def test_prefills_leave_less_time() -> None:
    scheduler = decoding(a=4, b=1)
    set_step_times(scheduler, "a", of4=0.005)
    set_step_times(scheduler, "b", of1=0.004, of4=0.013)
    scheduler.fair_share.used = dict.fromkeys(scheduler.fair_share.used, 0.0)
    scheduler.fair_share.used["a", "prefill"], scheduler.fair_share.used["b", "decode"] = 6.0, 4.0
    utilization, trackers = utilization_of(scheduler)
    assert 1 - DEFAULT_TUNING.measure_weight * 0.6 < 0.25 + 0.65 < 1
    assert not utilization.allows(trackers["b"], scheduler, 3)
    # Old prefills lose their weight.
    for second in range(1, 20):
        scheduler.fair_share.used["b", "decode"] += 1.0
        utilization.update(trackers, scheduler, float(second))
    assert utilization.allows(trackers["b"], scheduler, 3)


def test_prefills_and_an_earlier_pace_leave_less_room() -> None:
    scheduler = decoding(a=4, b=1)
    set_step_times(scheduler, "a", of4=0.010)
    set_step_times(scheduler, "b", of1=0.009)
    utilization, trackers = utilization_of(scheduler)
    assert utilization.total == pytest.approx(0.95)
    assert utilization.leaves_room(0.98)
    assert not utilization.leaves_room(0.9)
    scheduler.fair_share.used = dict.fromkeys(scheduler.fair_share.used, 0.0)
    scheduler.fair_share.used["a", "prefill"], scheduler.fair_share.used["b", "decode"] = 2.0, 8.0
    utilization.update(trackers, scheduler, 1.0)
    assert not utilization.leaves_room(0.98)  # 0.98 x (1 - 0.3 x 0.2)
