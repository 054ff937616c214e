"""`slo`: steps in the order that latency targets ask for, one program at a time.

1. Prefills that are due go first (`pacing.py` says when), those that can still meet a target for
   the first token before the others, then the model furthest behind its share of the time; until
   prefills are ahead of their shares by their part of `PREFILL_OVERDRAFT`, as under `adbs`. Where
   more sequences would make all of them late (`strain.py`), prompts wait for some to end, unless
   they have a target for the first token.
2. Then decodes: first models whose next tokens are due, by a target for each token or by tight ones
   for whole requests that all can keep, then whoever is furthest behind its share of the time, as
   under `adbs`; but where targets are so tight that turns make everybody late, the oldest first.
3. Then prefills beyond their shares, and prompts that could still wait, so that nothing idles.

A decode burst lasts no longer than a prompt that came now would wait for others anyway: few
sequences are soon interrupted, many seldom. It ends earlier where prompts of a model become due, or
the tokens of a model with a target for each, but never before `SHORT_TOKENS`, since a step has a
cost of its own, unless targets are so tight that such a burst would take up most of one. Shares and
their bounded overdraft, targets that pass, and the turns that lost causes get (`lost_causes.py`)
keep everybody from starving.
"""

from __future__ import annotations

import math

from muxjax.scheduling.fair_share import StepKey
from muxjax.scheduling.policies.adbs import PREFILL_OVERDRAFT
from muxjax.scheduling.policies.chunk_size import prefill_chunk_tokens
from muxjax.scheduling.policies.deferral import DeferralQueue
from muxjax.scheduling.policies.edf_order import edf_order
from muxjax.scheduling.policies.slo_tracker import SloTracker
from muxjax.scheduling.policies.slo_utilization import SloUtilization
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Prefill, Step

SHORT_TOKENS, SHORT_BURST = 4, 0.03
"""The least of a decode burst: so many tokens, as long as they take no longer than so many seconds.
A step costs as much as a tenth to a third of a token however many it makes, on two cores; with half
as many tokens a tenth less was served in time at saturation, with 0.03 s of tokens of 2 ms requests
of few tokens came too late."""
LONG_BURST = 0.4
"""Seconds of the longest, where one token does not take longer."""


class SloPolicy:
    """`slo`, one program at a time."""

    name = "slo"

    def __init__(self) -> None:
        self._paces: dict[str, SloTracker] = {}
        self._all: list[SloTracker] = []
        self._lost = DeferralQueue([])
        self._strain = SloUtilization()
        self._membership = -1  # `unit.membership` that they were made for
        self._last = ""  # the model of the last step
        self._saved = self._spare = 0.0  # the least of all models, see `SloTracker.look`
        self._tight = self._owes = False
        self._cut = False  # whether the last step was a part of a prefill

    def next_step(self, unit: Scheduler, now: float) -> Step | None:
        self._look(unit)
        step = self._pick(unit, now)
        if step is not None:
            self._last = step.model
            self._cut = self._cut and isinstance(step, Prefill)
        return step

    def _pick(self, unit: Scheduler, now: float) -> Step | None:
        strain = self._strain
        strain.look(self._paces, unit, now)
        self._lost.look(unit, strain, now)
        waiting: list[StepKey] = []
        decodes: list[StepKey] = []
        running = 0
        for pace in self._all:
            state = pace.state
            if state.prefilling or state.first is not None:
                waiting.append(state.prefills)
            if state.running:
                running += len(state.running)
                decodes.append(state.decodes)
            else:
                pace.rests()
        unit.time.begin(waiting + decodes)
        due, late, early, pause = self._sorted(unit, waiting, running, now)
        # Between the parts of a prefill come the tokens that it was cut for.
        tokens_due = self._tokens_due(decodes)
        if not (self._cut and tokens_due <= now):
            step = self._prefill(unit, due, tokens_due - now)
            if step is not None:
                return step
        order, next_due = edf_order(self._paces, unit, decodes, now, strain)
        seconds = min(pause, next_due - now)
        for model in order:
            step = self._decode(unit, model, seconds, now)
            if step is not None:
                return step
        step = self._prefill(unit, due + late, math.inf)
        if step is not None:
            return step
        for model in early:
            step = unit.make_prefill(model)
            if step is not None:
                return step
        return None

    def _look(self, unit: Scheduler) -> None:
        """Works out anew what depends on step times alone: those of one model have changed."""
        if self._membership != unit.membership:
            self._membership = unit.membership
            self._paces = {n: SloTracker(s, unit.estimates) for n, s in unit.models.items()}
            self._all = list(self._paces.values())
            self._lost = DeferralQueue(self._all)
        elif self._last:
            self._paces[self._last].look()
        else:
            return
        self._last = ""
        self._saved = min([pace.saved for pace in self._all])
        self._spare = min([pace.spare for pace in self._all])
        self._tight = any(pace.tight for pace in self._all)
        self._owes = any(pace.owes for pace in self._all)

    def _tokens_due(self, decodes: list[StepKey]) -> float:
        """When a step must begin for all tokens to be in time of models with a target for each."""
        if not self._owes:
            return math.inf
        return min([self._paces[model].latest_decode() for model, _ in decodes], default=math.inf)

    def _sorted(
        self, unit: Scheduler, waiting: list[StepKey], running: int, now: float
    ) -> tuple[list[str], list[str], list[str], float]:
        """Models whose prompts are due, are due but beyond their shares, and can wait; and how long
        decodes may last until prompts are due. Those that have no slot or no pages for them are not
        among them.
        """
        time = unit.time
        # What a prompt of the most urgent model would wait for others if it came now.
        pause = min(running * self._saved, self._spare, LONG_BURST)
        # Beyond it a model's prefills are ahead by more than their part of the overdraft.
        ahead = time.mean + PREFILL_OVERDRAFT / (sum([time.shares[t] for t in waiting]) or 1.0)
        due: list[tuple[tuple[int, float], str]] = []
        late: list[str] = []
        early: list[tuple[float, str]] = []
        for turn in waiting:
            model, pace = turn[0], self._paces[turn[0]]
            if not unit.may_prefill(model):
                continue
            patience, virtual = pace.patience(running, now), time.virtual(turn)
            if patience > 0 and running:
                early.append((patience, model))
                pause = min(pause, patience)
            elif virtual <= ahead:
                due.append((pace.place(virtual, now), model))
            else:
                late.append(model)
        first = [model for _, model in sorted(due)]
        return first, late, [model for _, model in sorted(early)], pause

    def _prefill(self, unit: Scheduler, models: list[str], seconds: float) -> Step | None:
        """A step of the first model that has pages for one and whose prompts need not wait; a part
        of one if it would take longer than others can wait for their tokens.
        """
        for model in models:
            pace = self._paces[model]
            if pace.may_begin(unit, self._strain):
                most = prefill_chunk_tokens(pace.state.spec, unit.estimates, seconds)
                step: Step | None = unit.make_prefill(model, most)
                if step is not None:
                    self._cut = most < pace.state.spec.limits.max_prefill_tokens
                    return step
        return None

    def _decode(self, unit: Scheduler, model: str, seconds: float, now: float) -> Step | None:
        size = len(unit.models[model].running)
        token = unit.estimates.decode(model, size)
        least = 0 if self._tight else min(SHORT_TOKENS, int(SHORT_BURST / token))
        step = unit.make_decode(model, max(least, int(seconds / token)))
        if step is not None:
            self._paces[model].began_decode(step.num_tokens, now)
        return step
