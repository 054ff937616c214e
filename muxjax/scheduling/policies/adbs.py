"""`adbs`: MuxServe's adaptive batch scheduling (Duan et al., ICML 2024, section 3.4, Algorithm 3),
for one program at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from muxjax.scheduling.fair_share import StepKey
from muxjax.scheduling.policies.chunk_size import prefill_chunk_tokens
from muxjax.scheduling.policies.interface import Policy, SchedulerView, StepProposal

# Evidence for the constants: docs/measurements/slo-tuning.md.
BURST_SECONDS = 0.1
"""Duration of a decode burst, in seconds. It is long relative to the host time between two steps,
and short enough that a new prompt starts soon."""
MIN_BURST_SECONDS = 0.02
"""Minimum duration of a decode burst of a model with a small share, in seconds."""
PREFILL_OVERDRAFT = 2.0
"""Maximum seconds that the prefills of all models may together be ahead of their shares and still
go first. A decode step costs nearly the same for one sequence as for many, so decodes should start
after a wave of prompts is prefilled."""


class AdaptiveBatchScheduling(Policy):
    """`adbs`: prefills first, then decodes, each within its share of device time.

    Algorithm 3 launches one prefill at a time, models in turn, and fills the rest of the chip with
    decodes, models in turn, within their shares of the chip. Here programs run one at a time and
    shares are of time (`FairShare`):

    1. Prefills go first, the model furthest behind its share before the others, until prefills are
       ahead of their shares by their part of `PREFILL_OVERDRAFT`.
    2. Then the key furthest behind its share goes, prefill or decode.
    3. A decode burst lasts `BURST_SECONDS`, less for a model whose share is below the mean of the
       models that decode.
    4. A prefill beside decodes may last as long as the remaining overdraft. When that is used up,
       it may last as long as a decode burst, or longer if its share is above that mean
       (`chunk_size.py`).

    A model that cannot run, for lack of pages or because all its tokens are in flight, is skipped.
    Algorithm 3 starts no decode while a prefill waits for compute; here a prefill waits only for
    pages or slots, which decodes free.
    """

    name = "adbs"

    def propose(self, view: SchedulerView, now: float) -> Iterator[StepProposal]:
        del now
        prefills, decodes = view.backlog()
        fair_share = view.fair_share
        virtual_time = fair_share.virtual_time
        prefills.sort(key=virtual_time)
        # Virtual time at which the overdraft is used up.
        limit = math.inf
        if prefills and decodes:
            shares = fair_share.shares
            limit = fair_share.mean_virtual_time + PREFILL_OVERDRAFT / sum(
                [shares[key] for key in prefills]
            )
        for key in prefills:
            if virtual_time(key) > limit:
                break
            if view.may_prefill(key[0]):
                yield self._prefill(view, key, decodes, limit)
        keys = [key for key in prefills if virtual_time(key) > limit] + decodes
        keys.sort(key=virtual_time)
        for key in keys:
            model, phase = key
            if phase == "decode":
                yield StepProposal(model, "decode", self._burst_tokens(view, key, decodes))
            elif view.may_prefill(model):
                yield self._prefill(view, key, decodes, limit)

    def _prefill(
        self, view: SchedulerView, key: StepKey, decodes: list[StepKey], limit: float
    ) -> StepProposal:
        seconds = self._prefill_seconds(view, key, decodes, limit)
        tokens = prefill_chunk_tokens(view.models[key[0]].spec, view.estimates, seconds)
        return StepProposal(key[0], "prefill", tokens)

    @staticmethod
    def _prefill_seconds(
        view: SchedulerView, key: StepKey, decodes: list[StepKey], limit: float
    ) -> float:
        """Maximum duration of a prefill, in seconds.

        Args:
          view: state of the scheduler.
          key: the prefill.
          decodes: keys that have sequences to decode.
          limit: virtual time at which the overdraft is used up; infinite without decodes.
        """
        shares = view.fair_share.shares
        left = (limit - view.fair_share.virtual_time(key)) * shares[key]
        if left >= BURST_SECONDS or not decodes:
            return left
        mean = sum([shares[other] for other in decodes]) / len(decodes)
        return max(left, BURST_SECONDS * max(1.0, shares[key] / mean))

    @staticmethod
    def _burst_tokens(view: SchedulerView, key: StepKey, decodes: list[StepKey]) -> int:
        """Tokens per sequence in a decode burst."""
        shares = view.fair_share.shares
        mean = sum([shares[other] for other in decodes]) / len(decodes)
        seconds = BURST_SECONDS * min(1.0, shares[key] / mean)
        batch = len(view.models[key[0]].running)
        return int(max(MIN_BURST_SECONDS, seconds) / view.estimates.decode(key[0], batch))
