"""SLO utilization: the part of the time that decodes need for all sequences to meet their targets.

A model whose sequences need a token every `tpot` seconds and whose decode step takes `d` seconds
needs `d / tpot` of the time; the sum over models is the SLO utilization. If it and the prefills
need more time than there is, all requests are late, and larger batches help none of them. Then
prompts wait until running sequences end.
"""

from __future__ import annotations

from collections.abc import Mapping

from muxjax.scheduling.policies.interface import SchedulerView
from muxjax.scheduling.policies.slo_tracker import SloTracker
from muxjax.scheduling.policies.slo_tuning import DEFAULT_TUNING, SloTuning


class SloUtilization:
    """SLO utilization of all models of a unit, as of the last `update`; 0 before the first.

    Args:
      tuning: constants.
    """

    def __init__(self, tuning: SloTuning = DEFAULT_TUNING) -> None:
        self._tuning = tuning
        self._by_model: dict[str, float] | None = {}
        self._total = 0.0
        self._trackers: Mapping[str, SloTracker] = {}
        self._prefill_part = 0.0
        self._measured_seconds = (0.0, 0.0)  # prefills and all steps, at the last measurement
        self._next_measurement = 0.0

    def update(self, trackers: Mapping[str, SloTracker], view: SchedulerView, now: float) -> None:
        """Resets the utilization to that of the sequences that decode now.

        It is computed when it is read, since most steps do not need it.
        """
        self._trackers, self._by_model = trackers, None
        if now >= self._next_measurement:
            self._next_measurement = now + self._tuning.measure_seconds
            self._measure_prefills(view)

    @property
    def by_model(self) -> Mapping[str, float]:
        """Utilization of each model that decodes."""
        if self._by_model is None:
            trackers = self._trackers.items()
            self._by_model = {name: t.utilization() for name, t in trackers if t.state.running}
            self._total = sum(self._by_model.values())
        return self._by_model

    @property
    def total(self) -> float:
        """Sum over models; 0 if none decodes. Above 1, not all models can meet their targets."""
        return self._total if self.by_model else 0.0

    def leaves_room(self, pace_part: float) -> bool:
        """Whether all sequences can keep to this part of their allowed pace, besides prefills."""
        return self.total <= pace_part * (1 - self._prefill_part)

    def may_prefill(self, tracker: SloTracker, view: SchedulerView) -> bool:
        """Whether a model's prompts need not wait until running sequences end."""
        state = tracker.state
        if state.prefilling or tracker.has_first_token_target:
            return True
        limit = state.spec.limits.max_prefill_seqs
        return self.allows(tracker, view, min(limit, len(state.waiting)))

    def allows(self, tracker: SloTracker, view: SchedulerView, count: int) -> bool:
        """Whether `count` sequences of a model may begin beside those that decode.

        True if any of these holds:

        - no model decodes, or the model's targets are tight;
        - all models still meet their targets, besides prefills;
        - the new sequences add next to nothing to the utilization;
        - the model decodes nothing and has used less than its share so far;
        - the model stays within its share of the decodes' time.
        """
        by_model = self.by_model
        if tracker.is_tight or not by_model:
            return True
        spec, running = tracker.state.spec, len(tracker.state.running)
        name, tpot, decode = spec.name, tracker.tpot(), view.estimates.decode
        batch = running + max(1, min(count, spec.limits.max_seqs - running))
        before = by_model.get(name, 0.0)
        after = decode(name, batch) / tpot
        available = 1 - self._prefill_part
        if self._total - before + after <= available:
            return True
        if before:
            # A batch that has just grown into the next bucket can shrink again.
            half = decode(name, (batch + 1) // 2) / tpot
            if after - min(before, half) <= self._tuning.free_utilization:
                return True
        elif view.fair_share.credit((name, "decode")) >= 0:
            return True
        return after <= available * view.fair_share.phase_share((name, "decode"))

    def _measure_prefills(self, view: SchedulerView) -> None:
        """Measures the prefills' part of the time since the last measurement."""
        used = view.fair_share.used
        prefills = sum([seconds for (_, phase), seconds in used.items() if phase == "prefill"])
        total = sum(used.values())
        before, self._measured_seconds = self._measured_seconds, (prefills, total)
        if total > before[1]:
            part = min(1.0, max(0.0, (prefills - before[0]) / (total - before[1])))
            self._prefill_part += self._tuning.measure_weight * (part - self._prefill_part)
