"""How much of the time decodes need for all sequences to keep to their targets.

A model whose sequences must have a token every `tpot` seconds, and whose step takes `d`, needs
`d / tpot` of the time. The sum over models is the strain. Where it and the prefills' part of the
time come to more than there is, everybody is late, and batches that are fuller still serve nobody
in time: prompts that would cost decodes more wait then, until those that run have ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from muxjax.scheduling.policies.slo_tracker import SloTracker
    from muxjax.scheduling.scheduler import Scheduler

FREE = 0.02
"""Strain that new sequences may add at any time: in a batch that has room for them they cost next
to nothing."""
LOOK_SECONDS = 0.5
"""How often the prefills' part of the time is measured."""
NEW_WEIGHT = 0.3
"""Weight of a new measurement against all before it."""


class SloUtilization:
    """Of one unit, as of the last `look`; none until then."""

    def __init__(self) -> None:
        self._loads: dict[str, float] | None = {}
        self._total = 0.0
        self._paces: Mapping[str, SloTracker] = {}
        self._prefills = 0.0
        self._used = (0.0, 0.0)
        self._look_at = 0.0

    def look(self, paces: Mapping[str, SloTracker], unit: Scheduler, now: float) -> None:
        """Takes the sequences that decode now. Their strain is worked out when it is asked for, as
        most steps need none.
        """
        self._paces, self._loads = paces, None
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._measure(unit)

    @property
    def loads(self) -> Mapping[str, float]:
        """The strain of each model that decodes."""
        if self._loads is None:
            self._loads = {n: pace.load() for n, pace in self._paces.items() if pace.state.running}
            self._total = sum(self._loads.values())
        return self._loads

    @property
    def total(self) -> float:
        """The sum over models; 0 where nobody decodes; above 1, steps in turn keep nobody to its
        target.
        """
        return self._total if self.loads else 0.0

    def leaves_room(self, pace: float) -> bool:
        """Whether steps in turn keep all sequences to this part of what their targets allow, beside
        prefills.
        """
        return self.total <= pace * (1 - self._prefills)

    def allows(self, pace: SloTracker, unit: Scheduler, count: int) -> bool:
        """Whether so many sequences of a model may begin beside those that decode.

        Always where nobody decodes, where they cost next to nothing, where the model keeps to its
        share of the decodes' time, or has nothing running and used less than its share so far, and
        where targets are tight (`LEAST_MODELS` in `pacing.py`).
        """
        loads = self.loads
        if pace.tight or not loads:
            return True
        spec, running = pace.state.spec, len(pace.state.running)
        model, tpot = spec.name, pace.tpot()
        size = running + max(1, min(count, spec.limits.max_seqs - running))
        before = loads.get(model, 0.0)
        after = unit.estimates.decode(model, size) / tpot
        most = 1 - self._prefills
        if self._total - before + after <= most:
            return True
        if before:
            # A batch that is just large enough for the next bucket need not stay that large.
            half = unit.estimates.decode(model, (size + 1) // 2) / tpot
            if after - min(before, half) <= FREE:
                return True
        elif unit.time.credit((model, "decode")) >= 0:
            return True
        return after <= most * unit.time.part((model, "decode"))

    def _measure(self, unit: Scheduler) -> None:
        """The prefills' part of the time since the last measurement."""
        used = unit.time.used
        prefills = sum([seconds for (_, phase), seconds in used.items() if phase == "prefill"])
        total = sum(used.values())
        before, self._used = self._used, (prefills, total)
        if total > before[1]:
            part = min(1.0, max(0.0, (prefills - before[0]) / (total - before[1])))
            self._prefills += NEW_WEIGHT * (part - self._prefills)
