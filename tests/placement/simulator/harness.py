"""Steps applied by hand, and a small simulation."""

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


def kind(step: Step | None) -> tuple[str, str] | None:
    if step is None:
        return None
    return step.model, "prefill" if isinstance(step, Prefill) else "decode"


def started(of: Scheduler, now: float = 0.0) -> list[Step]:
    """All steps that can start now."""
    steps = []
    while (step := of.next_step(now)) is not None:
        steps.append(step)
        assert len(steps) < 20
    return steps


def finish(of: Scheduler, step: Step, now: float = 0.0) -> None:
    if isinstance(step, Prefill):
        tokens = [[0] if chunk.last else [] for chunk in step.chunks]
    else:
        tokens = [[0] * sequence.num_tokens for sequence in step.sequences]
    of.apply(step, StepResult(tokens, [None] * len(tokens), now, 0.01), now)
    of.check_invariants()


def workload(count: int = 40) -> Workload:
    return [TraceRequest(index / 10, "ab"[index % 2], 20, 10) for index in range(count)]
