"""Applies steps without a clock, and defines a small simulation."""

from __future__ import annotations

from muxjax.placement.simulator.metrics import AttainmentCriterion
from muxjax.placement.simulator.simulation import SimulationSetup
from muxjax.placement.workload.trace import TraceRequest, Workload
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Prefill, Step, StepResult
from tests.placement.simple_costs import SimpleCosts, plan, planned, unit

SETUP = SimulationSetup(
    plan(unit(planned("a"), planned("b"))),
    {"toy": SimpleCosts()},
    {name: AttainmentCriterion.from_targets(scale=3.0, kind="small") for name in ("a", "b")},
    seed=5,
    workload={"workload": "test"},
)


def step_key(step: Step | None) -> tuple[str, str] | None:
    if step is None:
        return None
    return step.model, "prefill" if isinstance(step, Prefill) else "decode"


def schedule_steps(scheduler: Scheduler, now: float = 0.0) -> list[Step]:
    """Schedules all steps that can start now."""
    steps = []
    while (step := scheduler.next_step(now)) is not None:
        steps.append(step)
        assert len(steps) < 20
    return steps


def finish_step(scheduler: Scheduler, step: Step, now: float = 0.0) -> None:
    if isinstance(step, Prefill):
        tokens = [[0] if chunk.last else [] for chunk in step.chunks]
    else:
        tokens = [[0] * sequence.num_tokens for sequence in step.sequences]
    scheduler.apply(step, StepResult(tokens, [None] * len(tokens), now, 0.01), now)
    scheduler.check_invariants()


def workload(count: int = 40) -> Workload:
    return [TraceRequest(index / 10, "ab"[index % 2], 20, 10) for index in range(count)]
