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
the tokens of a model with a target for each, but never before `SHORT_BURST`, since a step has a
cost of its own, unless targets are so tight that such a burst would take up most of one. Shares and
their bounded overdraft, targets that pass, and the turns that deferred requests get keep everybody
from starving.
"""

from __future__ import annotations

from muxjax.scheduling.adaptive_batch import PREFILL_OVERDRAFT
from muxjax.scheduling.pacing import Pace, decodes_in_order
from muxjax.scheduling.steps import Step
from muxjax.scheduling.strain import Strain
from muxjax.scheduling.time_quotas import Turn
from muxjax.scheduling.unit import Unit

SHORT_BURST, LONG_BURST = 0.06, 0.4
"""Seconds of the shortest and the longest decode burst, where one token does not take longer. A
step costs two to six milliseconds however many tokens it makes, on two cores."""


class SloPolicy:
    """`slo`, one program at a time."""

    name = "slo"

    def __init__(self) -> None:
        self._paces: dict[str, Pace] = {}
        self._strain = Strain()
        self._membership = -1  # `unit.membership` that they were made for

    def next_step(self, unit: Unit, now: float) -> Step | None:
        if self._membership != unit.membership:
            self._membership = unit.membership
            self._paces = {n: Pace(s, unit.estimates) for n, s in unit.models.items()}
        paces, strain = self._paces, self._strain
        strain.look(paces, unit, now)
        waiting: list[Turn] = []
        decodes: list[Turn] = []
        running = 0
        for model, state in unit.models.items():
            if state.has_prefill:
                paces[model].sort_line(unit, strain, now)
                if state.prefilling or state.waiting:
                    waiting.append((model, "prefill"))
            if state.running:
                running += len(state.running)
                decodes.append((model, "decode"))
        unit.time.begin(waiting + decodes)
        shortest = 0.0 if any(pace.tight for pace in paces.values()) else SHORT_BURST
        due, late, early, pause = self._sorted(unit, waiting, running, shortest, now)
        step = self._prefill(unit, due)
        if step is not None:
            return step
        order, next_due = decodes_in_order(paces, unit, now, strain.total)
        seconds = max(shortest, min(pause, next_due - now))
        for model in order:
            step = self._decode(unit, model, seconds, now)
            if step is not None:
                return step
        step = self._prefill(unit, late)
        if step is not None:
            return step
        for model in early:
            step = unit.make_prefill(model)
            if step is not None:
                return step
        return None

    def _sorted(
        self, unit: Unit, waiting: list[Turn], running: int, shortest: float, now: float
    ) -> tuple[list[str], list[str], list[str], float]:
        """Models whose prompts are due, are due but beyond their shares, and can wait; and how long
        decodes may last until prompts are due. Those that have no slot for them are not among them.
        """
        time = unit.time
        pause = min([pace.patience_of_one(running) for pace in self._paces.values()])
        pause = min(max(pause, shortest), LONG_BURST)
        total = sum([time.shares[turn] for turn in waiting])
        due: list[tuple[tuple[int, float], str]] = []
        late: list[str] = []
        early: list[tuple[float, str]] = []
        for turn in waiting:
            model, pace = turn[0], self._paces[turn[0]]
            patience = pace.patience(running, now)
            if patience > 0 and running:
                early.append((patience, model))
                pause = min(pause, patience)
            elif not (pace.state.free_slots or pace.state.prefilling):
                continue
            elif time.credit(turn) >= -PREFILL_OVERDRAFT * time.shares[turn] / total:
                due.append((pace.place(time.virtual(turn), now), model))
            else:
                late.append(model)
        first = [model for _, model in sorted(due)]
        return first, late, [model for _, model in sorted(early)], pause

    def _prefill(self, unit: Unit, models: list[str]) -> Step | None:
        """A step of the first model that has pages for one and whose prompts need not wait."""
        for model in models:
            if self._paces[model].may_begin(unit, self._strain):
                step: Step | None = unit.make_prefill(model)
                if step is not None:
                    return step
        return None

    def _decode(self, unit: Unit, model: str, seconds: float, now: float) -> Step | None:
        size = len(unit.models[model].running)
        step = unit.make_decode(model, int(seconds / unit.estimates.decode(model, size)))
        if step is not None:
            self._paces[model].began_decode(step.num_tokens, now)
        return step
