"""The `slo` policy for concurrent execution."""

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
    """`slo`: a separate part of the chip for each model, and shares that idle models lend.

    A prefill on the full chip, as in `adbs`, stops all decodes, and programs on the rest of a
    shared chip are slow. Both violate tight targets. With separate parts, prefills delay only
    decodes of the same model. Prompts wait for each other to save prefill steps
    (`slo_tracker.py`). Models are independent and are not ordered; pages are lent as in the other
    policies.

    Args:
      compute: shares of the chip.
    """

    name = "slo"

    def __init__(self, compute: ComputeShares) -> None:
        super().__init__(compute)
        self._trackers: dict[str, SloTracker] = {}
        self._deferral: dict[str, DeferralQueue] = {}
        self._utilization = SloUtilization()  # always 0: no model delays decodes of another
        self._models_version = -1  # version of the models that the trackers belong to

    def propose(self, view: SchedulerView, now: float) -> Iterator[Proposal]:
        if self._models_version != view.models_version:
            self._models_version = view.models_version
            self._trackers = {n: SloTracker(s, view.estimates) for n, s in view.models.items()}
            self._deferral = {n: DeferralQueue([t]) for n, t in self._trackers.items()}
        return super().propose(view, now)

    def on_scheduled(self, view: SchedulerView, step: Step, now: float) -> None:
        """Lends idle shares to the step, and records decodes in the model's tracker."""
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
        """Models with a free part of the chip and prompts that are due."""
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
        """Models with a free part of the chip and sequences to decode."""
        for model, state in view.models.items():
            if not state.running:
                self._trackers[model].note_idle()
        return super()._select_decodes(view)
