"""`slo` where programs run side by side. See `pacing.py` for what latency targets ask for."""

from __future__ import annotations

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.placement.simulator.concurrent_policies import ConcurrentStatic
from muxjax.scheduling.fair_share import Phase, StepKey
from muxjax.scheduling.policies.deferral import DeferralQueue
from muxjax.scheduling.policies.slo_tracker import SloTracker
from muxjax.scheduling.policies.slo_utilization import SloUtilization
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Prefill, Step


class ConcurrentSlo(ConcurrentStatic):
    """`slo`: each model on its own part of the chip, where its prompts wait for each other, and on
    what those leave that have nothing to do.

    Beside a prefill that takes the whole chip, as under `adbs`, nobody else decodes, and programs
    that share what is left are slow: tight targets allow neither. On its own part a model is held
    up by its own prefills alone, and that is what prompts wait for. Nobody waits for the parts of
    others, so that there is no order among models; pages are lent as under the other policies.
    """

    name = "slo"

    def __init__(self, compute: ComputeShares) -> None:
        super().__init__(compute)
        self._paces: dict[str, SloTracker] = {}
        self._lost: dict[str, DeferralQueue] = {}
        self._strain = SloUtilization()  # stays 0: nobody is slower for what others decode
        self._membership = -1  # `unit.membership` that they were made for

    def next_step(self, unit: Scheduler, now: float) -> Step | None:
        if self._membership != unit.membership:
            self._membership = unit.membership
            self._paces = {name: SloTracker(s, unit.estimates) for name, s in unit.models.items()}
            self._lost = {name: DeferralQueue([pace]) for name, pace in self._paces.items()}
        return super().next_step(unit, now)

    def prefills(self, unit: Scheduler, now: float) -> list[str]:
        """Models whose part of the chip is free and whose prompts are due."""
        due = []
        for model in super().prefills(unit, now):
            self._lost[model].look(unit, self._strain, now)
            pace, state = self._paces[model], unit.models[model]
            if state.first is None and not state.prefilling:
                continue
            running = len(state.running)
            if not running or pace.patience(running, now) <= 0:
                due.append(model)
        return due

    def decodes(self, unit: Scheduler, now: float) -> list[str]:
        """Models with sequences to decode whose part of the chip is free."""
        for model, state in unit.models.items():
            if not state.running:
                self._paces[model].rests()
        return super().decodes(unit, now)

    def made(self, unit: Scheduler, step: Step, now: float) -> None:
        """Lends what is idle, and notes what targets count with."""
        phase: Phase = "prefill" if isinstance(step, Prefill) else "decode"
        working: list[StepKey] = [
            (model, phase)
            for model, state in unit.models.items()
            if state.has_prefill or state.has_decode
        ]
        self._compute.lend((step.model, phase), unit.in_flight(), working)
        if not isinstance(step, Prefill):
            self._paces[step.model].began_decode(step.num_tokens, now)
