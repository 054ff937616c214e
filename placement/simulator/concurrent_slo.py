"""`slo` for programs that run concurrently."""

from __future__ import annotations

from collections.abc import Iterator

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.placement.simulator.concurrent_policies import ConcurrentStatic
from muxjax.scheduling.fair_share import Phase, StepKey
from muxjax.scheduling.policies.deferral import DeferralQueue
from muxjax.scheduling.policies.interface import Defer, Proposal, Recall, SchedulerView
from muxjax.scheduling.policies.slo_tracker import SloTracker
from muxjax.scheduling.policies.slo_utilization import SloUtilization
from muxjax.scheduling.steps import Prefill, Step


class ConcurrentSlo(ConcurrentStatic):
    """`slo`: each model on its own part of the chip, and on shares that idle models lend.

    A prefill that uses the whole chip, as in `adbs`, stops all decodes, and programs on the rest of
    the chip are slow: tight targets allow neither. On its own part, a model's decodes are delayed
    by its own prefills only, and its prompts wait for each other to save prefill steps
    (`slo_tracker.py`). Models are independent, so there is no order among them; pages are lent as
    with the other policies.

    Args:
      compute: shares of the chip.
    """

    name = "slo"

    def __init__(self, compute: ComputeShares) -> None:
        super().__init__(compute)
        self._trackers: dict[str, SloTracker] = {}
        self._deferral: dict[str, DeferralQueue] = {}
        self._utilization = SloUtilization()  # stays 0: no model slows another's decodes
        self._models_version = -1  # version that the trackers were created for

    def propose(self, view: SchedulerView, now: float) -> Iterator[Proposal]:
        if self._models_version != view.models_version:
            self._models_version = view.models_version
            self._trackers = {n: SloTracker(s, view.estimates) for n, s in view.models.items()}
            self._deferral = {n: DeferralQueue([t]) for n, t in self._trackers.items()}
        return super().propose(view, now)

    def on_scheduled(self, view: SchedulerView, step: Step, now: float) -> None:
        """Lends idle shares to the step, and notes decodes for the targets."""
        phase: Phase = "prefill" if isinstance(step, Prefill) else "decode"
        active: list[StepKey] = [
            (model, phase)
            for model, state in view.models.items()
            if state.has_prefill or state.has_decode
        ]
        self._compute.lend((step.model, phase), view.in_flight_keys(), active)
        if not isinstance(step, Prefill):
            self._trackers[step.model].note_decode(step.num_tokens, now)

    def _change_queues(self, view: SchedulerView, now: float) -> Iterator[Defer | Recall]:
        for model in super()._select_prefills(view, now):
            yield from self._deferral[model].propose(view, self._utilization, now)

    def _select_prefills(self, view: SchedulerView, now: float) -> list[str]:
        """Models whose part of the chip is free and whose prompts are due."""
        due = []
        for model in super()._select_prefills(view, now):
            tracker, state = self._trackers[model], view.models[model]
            if state.first is None and not state.prefilling:
                continue
            running = len(state.running)
            if not running or tracker.patience(running, now) <= 0:
                due.append(model)
        return due

    def _select_decodes(self, view: SchedulerView) -> list[str]:
        """Models with sequences to decode whose part of the chip is free."""
        for model, state in view.models.items():
            if not state.running:
                self._trackers[model].note_idle()
        return super()._select_decodes(view)
