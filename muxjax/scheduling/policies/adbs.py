"""`adbs`: MuxServe's adaptive batch scheduling (Duan et al., ICML 2024, section 3.4, Algorithm 3),
for one program at a time.
"""

from __future__ import annotations

import math

from muxjax.scheduling.fair_share import StepKey
from muxjax.scheduling.policies.chunk_size import prefill_chunk_tokens
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Step

BURST_SECONDS = 0.1
"""How long a decode burst may take: long enough that the host's work between two steps, about a
millisecond, does not count; short enough that a new prompt soon gets its turn."""
MIN_BURST_SECONDS = 0.02
PREFILL_OVERDRAFT = 2.0
"""Seconds that the prefills of all models may together be ahead of their shares and go first.
A decode step costs nearly the same for one sequence as for many, so that starting to decode before
a wave of prompts is in costs more than it gives: 8 prompts of 128 tokens (1.6 s) on two cores made
66 tokens/s with 0.5 s, and 95 with 2 s."""


class AdaptiveBatchScheduling:
    """`adbs`: prefill first, then decodes, each within its share of device time.

    Algorithm 3 launches one prefill at a time, models in turn, and fills the rest of the chip with
    decodes, models in turn, as far as their shares of the chip go. Here programs run one after the
    other and shares are of time (`TimeQuotas`):

    1. Prefills go first, the model furthest behind its share before the others, until prefills are
       ahead of their shares by their part of `PREFILL_OVERDRAFT`.
    2. Then whoever is furthest behind its share goes, prefill or decode.
    3. A decode burst is as long as `BURST_SECONDS` allows, shorter for a model whose share is
       smaller than that of others that decode.
    4. A prefill beside decodes lasts as long as is left of the overdraft; where nothing is, as long
       as such a burst, longer for a model whose share is larger than theirs (`prefill_size.py`).

    Whoever cannot go, for want of pages or because all its tokens are in flight, is passed over.
    Algorithm 3 starts no decodes while a prefill is held back for want of the chip; here a prefill
    is held back only for want of pages or slots, which decodes free.
    """

    name = "adbs"

    def next_step(self, unit: Scheduler, now: float) -> Step | None:
        del now
        time = unit.time
        prefills: list[StepKey] = []
        decodes: list[StepKey] = []
        for state in unit.models.values():
            if state.waiting or state.prefilling or state.deferred:
                prefills.append(state.prefills)
            if state.running:
                decodes.append(state.decodes)
        time.begin(prefills + decodes)
        virtual = time.virtual
        prefills.sort(key=virtual)
        ahead = math.inf
        if prefills and decodes:
            ahead = time.mean + PREFILL_OVERDRAFT / sum([time.shares[turn] for turn in prefills])
        step: Step | None
        for turn in prefills:
            if virtual(turn) > ahead:
                break
            step = self._prefill(unit, turn, decodes, ahead)
            if step is not None:
                return step
        turns = [turn for turn in prefills if virtual(turn) > ahead] + decodes
        turns.sort(key=virtual)
        for turn in turns:
            if turn[1] == "prefill":
                step = self._prefill(unit, turn, decodes, ahead)
            else:
                step = unit.make_decode(turn[0], self._burst(unit, turn, decodes))
            if step is not None:
                return step
        return None

    def _prefill(
        self, unit: Scheduler, turn: StepKey, decodes: list[StepKey], ahead: float
    ) -> Step | None:
        model = turn[0]
        if not unit.may_prefill(model):
            return None
        seconds = self._prefill_seconds(unit, turn, decodes, ahead)
        spec = unit.models[model].spec
        return unit.make_prefill(model, prefill_chunk_tokens(spec, unit.estimates, seconds))

    @staticmethod
    def _prefill_seconds(
        unit: Scheduler, turn: StepKey, decodes: list[StepKey], ahead: float
    ) -> float:
        """How long a prefill of this model may last.

        Args:
          unit: the unit.
          turn: the prefill.
          decodes: who has sequences to decode.
          ahead: virtual time at which the overdraft is used up; infinite where nobody decodes.
        """
        shares = unit.time.shares
        left = (ahead - unit.time.virtual(turn)) * shares[turn]
        if left >= BURST_SECONDS or not decodes:
            return left
        mean = sum([shares[other] for other in decodes]) / len(decodes)
        return max(left, BURST_SECONDS * max(1.0, shares[turn] / mean))

    @staticmethod
    def _burst(unit: Scheduler, turn: StepKey, decodes: list[StepKey]) -> int:
        """Tokens of a decode burst of this model."""
        shares = unit.time.shares
        mean = sum([shares[other] for other in decodes]) / len(decodes)
        seconds = BURST_SECONDS * min(1.0, shares[turn] / mean)
        size = len(unit.models[turn[0]].running)
        return int(max(MIN_BURST_SECONDS, seconds) / unit.estimates.decode(turn[0], size))
