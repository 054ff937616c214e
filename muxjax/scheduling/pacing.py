"""What latency targets ask of the next steps: which prompts are due, and whose tokens.

For each model (`Pace`):

- *Tokens*: with a target for each token, after `k` of them the next are due when the time that the
  target gives for `k` has passed, and whoever is due decodes first. Targets for whole requests say
  the same where they are tight and can be kept by all (`strain.py`); else they say nothing about
  the order: there shares of the time decide.
- *Prompts*: a prefill step costs something however few prompts it takes, and that is time in
  which nobody decodes. So prompts wait for each other, until all of them together have waited as
  long as the sequences that decode would lose by a step more (the rule of ski rental: at most twice
  what knowledge of the future would give), or until their targets allow no more: those of the
  shortest outputs, as long as the model keeps its targets.
- *Lost causes*: a request that would miss its target even if it began now is deferred, once:
  requests that can still make it go first. Deferred ones fill what the others leave, and one in
  `DEFERRED_TURNS` prompts is a deferred one, so that they are served even where the load never
  lets up.

How long an output will be is not known: the mean of what the model has made so far stands for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request
from muxjax.scheduling.steps import STEPS_AHEAD
from muxjax.scheduling.strain import MOST_STRAIN, Strain
from muxjax.scheduling.time_quotas import Turn
from muxjax.scheduling.unit import Unit

DEFERRED_TURNS = 10
SPEED_WEIGHT = 0.1
"""Weight of a new measurement of the seconds a token, against all before it."""
LOOKED_AT_PART = 0.1
"""Of the time that the first in line can still wait, after which that is worked out again."""
LOOK_AGAIN = 16
"""Steps after which what depends on slow means alone is worked out again."""
LEAST_MODELS = 5
"""Models at once, one sequence each, that targets must allow for taking turns to be worth it. Where
they are so tight that few can run at once, one after the other is better than all a bit slower."""
PACE = 0.98
"""Of the time a token that a target for the whole request allows. The first token takes the rest:
at 1 every fourth request of a 30B beside a 13B was just late. Less makes others wait for nothing:
at 0.8 the whole fleet served 2 % less."""
OVERDRAFT = 2.0
"""Seconds of decoding that a model may be ahead of its share where turns make everybody late."""
MARGIN = 1.1
"""How much longer than expected a request is taken to run when it is called a lost cause."""


class Pace:
    """One model's targets, and how it keeps up with them.

    Args:
      state: the model.
      estimates: step durations of the unit.

    Attributes:
      due: when its next tokens are due.
      speed: seconds for each token of a sequence, waiting for other models included.
      tight: whether the target for tokens allows less than `LEAST_MODELS` models, one sequence
        each, to take turns.
    """

    def __init__(self, state: ModelState, estimates: StepEstimates) -> None:
        self.state = state
        self._estimates = estimates
        self._name = state.spec.name
        self._targets = state.spec.targets
        self.due = 0.0
        self.speed = 0.0
        self._last: float | None = None
        self._tokens = 0
        self._turns = 0
        self._head: Request | None = None
        self._look_at = 0.0
        self._steps = 0
        self._one = (0.0, 0.0)
        self._find_tight()

    # Targets

    def alone_tpot(self) -> float:
        """Seconds a token, for a request that is alone."""
        return self._targets.alone_tpot or self._estimates.decode(self._name, 1)

    def alone_ttft(self, tokens: int) -> float:
        """Seconds to the first token of a request of so many that is alone."""
        given = self._targets.alone_ttft
        if given is not None:
            return given * tokens / max(1.0, self.state.spec.prompt_tokens)
        return self._estimates.prefill(self._name, tokens)

    def tpot(self) -> float:
        """Seconds for each token that the target allows."""
        return self._targets.tpot or self._targets.scale * self.alone_tpot()

    def expected_output(self, request: Request) -> float:
        """Tokens that the request is expected to make in all."""
        state = self.state
        mean = state.spec.output_tokens
        if state.finished:
            # What was expected counts as ten requests.
            mean = (10 * mean + state.output_tokens) / (10 + state.finished)
        return min(float(request.max_new_tokens), max(1.0, mean))

    def latest_start(self, request: Request) -> float:
        """When the request's prefill must begin for it to meet its target, as things go."""
        targets = self._targets
        tokens = len(request.prompt)
        if targets.ttft is not None:
            return request.arrival + targets.ttft - self._estimates.prefill(self._name, tokens)
        alone = self.alone_ttft(tokens)
        steps = self.expected_output(request) - 1
        if targets.tpot is not None:
            # Of a target for tokens, prompts may take nothing.
            return request.arrival + targets.scale * alone - alone
        spare = targets.scale * (alone + steps * self.alone_tpot())
        # Who begins only where the strain allows it is no slower than that, whatever went before.
        speed = min(self.speed, MOST_STRAIN * self.tpot())
        speed = max(speed, self._estimates.decode(self._name, len(self.state.running) + 1))
        prefill = self._estimates.prefill(self._name, tokens)
        return request.arrival + spare - MARGIN * (prefill + steps * speed)

    # What was done

    def began_decode(self, tokens: int, now: float) -> None:
        """Notes that a burst of so many tokens was submitted."""
        if self._last is not None and self._tokens:
            seconds = (now - self._last) / self._tokens
            old = self.speed
            self.speed = seconds if not old else old + SPEED_WEIGHT * (seconds - old)
        self._last, self._tokens = now, tokens
        allowed = tokens * self.tpot()
        if self._targets.tpot is None:
            allowed *= PACE
            self.due = min(self.due, now)  # who begins later has nothing of tokens that were early
        self.due = max(self.due, now - allowed) + allowed

    def latest_decode(self, whole: bool) -> float:
        """When a step must begin for the next tokens to be in time; never without a target.

        Args:
          whole: whether targets for whole requests count, not for tokens alone.
        """
        if self._targets.tpot is None:
            return self.due if whole else math.inf
        return self.due - self._estimates.decode(self._name, len(self.state.running))

    def rests(self) -> None:
        """Notes that there is nothing to decode: the time until there is does not count."""
        self._last = None

    # Prompts

    def sort_line(self, unit: Unit, strain: Strain, now: float) -> None:
        """Defers lost causes among those that are next, and brings deferred requests back."""
        state = self.state
        most = state.spec.limits.max_prefill_seqs
        head = next(iter(state.waiting.values()), None)
        if head is not None and (head is not self._head or now >= self._look_at):
            spare = math.inf
            for request in list(itertools.islice(state.waiting.values(), most)):
                if not request.deferred and not request.preemptions:
                    left = self.latest_start(request) - now
                    if left < 0:
                        unit.defer(request)
                    else:
                        spare = min(spare, left)
            # The time that is left is a guess, and is looked at again when a part has passed.
            self._head = next(iter(state.waiting.values()), None)
            self._look_at = now + LOOKED_AT_PART * spare
        if state.deferred:
            turns = state.finished // DEFERRED_TURNS
            recalls = int(turns > self._turns)
            self._turns = turns
            if not state.waiting:
                recalls = min(most, len(state.deferred))
                while recalls and not strain.allows(self, unit, recalls):
                    recalls //= 2
            for _ in range(recalls):
                unit.recall(self._name)

    def patience(self, running: int, now: float) -> float:
        """Seconds that the model's prompts may still wait for others; 0 or less: they are due.

        Args:
          running: sequences of all models, which a prefill step holds up.
          now: seconds.
        """
        state = self.state
        if state.prefilling:
            return 0.0
        limits = state.spec.limits
        count = len(state.waiting)
        tokens = count * max(1.0, state.spec.prompt_tokens)
        if count >= limits.max_prefill_seqs or tokens >= limits.max_prefill_tokens:
            return 0.0
        head = next(iter(state.waiting.values()))
        # They came one after the other, so that on average they waited half as long as the first.
        patience = 2 * running * self._saved(tokens) / (count + 1)
        return min(patience, self._spare(len(head.prompt))) - (now - head.arrival)

    def may_begin(self, unit: Unit, strain: Strain) -> bool:
        """Whether the model's prompts need not wait for sequences to end."""
        state = self.state
        if state.prefilling or self._targets.ttft is not None:
            return True
        most = state.spec.limits.max_prefill_seqs
        return strain.allows(self, unit, min(most, len(state.waiting)))

    def place(self, virtual: float, now: float) -> tuple[int, float]:
        """The order among models whose prompts are due: the least is first.

        Prompts that can still meet a target for the first token go first, in the order in which
        they must begin; then whoever is furthest behind its share of the time, so that a long line
        of one model does not keep the others waiting.

        Args:
          virtual: the virtual time of the model's prefills, see `time_quotas.py`.
          now: seconds.
        """
        if self._targets.ttft is not None:
            group = self.state.prefilling or self.state.waiting
            latest = min(map(self.latest_start, itertools.islice(group.values(), 1)), default=now)
            if latest >= now:
                return 0, latest
        return 1, virtual

    def patience_of_one(self, running: int) -> float:
        """Seconds that a prompt of mean length would wait for others if it came now."""
        if self._steps % LOOK_AGAIN == 0:
            tokens = max(1.0, self.state.spec.prompt_tokens)
            # It may meet a step that has just begun, and the next one behind it.
            self._one = self._saved(tokens), self._spare(round(tokens)) / STEPS_AHEAD
            self._find_tight()
        self._steps += 1
        saved, spare = self._one
        return min(running * saved, spare)

    def _find_tight(self) -> None:
        self.tight = LEAST_MODELS * self._estimates.decode(self._name, 1) > self.tpot()

    def _spare(self, tokens: int) -> float:
        """Seconds that a prompt may lose before its prefill begins.

        Without a target for the first token, what one may lose whose output is a single token, as
        nobody knows which ones are so short; but any time at all where the model does not keep its
        targets as it is, since then what counts is how much gets done.
        """
        targets = self._targets
        if targets.ttft is not None:
            allowed = targets.ttft
        elif self.speed > self.tpot():
            return math.inf
        else:
            allowed = targets.scale * self.alone_ttft(tokens)
        return allowed - self._estimates.prefill(self._name, tokens)

    def _saved(self, tokens: float) -> float:
        """Seconds that one prefill of twice as many tokens saves, against two."""
        once, twice = (self._estimates.prefill(self._name, round(n * tokens)) for n in (1, 2))
        return 2 * once - twice


def decodes_in_order(
    paces: Mapping[str, Pace], unit: Unit, now: float, total: float
) -> tuple[list[str], float]:
    """Models with sequences to decode, who is first before the others.

    First those whose next tokens are due: with a target for each token, and where targets for whole
    requests are tight and there is time to keep all of them. Shares of the time would give a model
    of small batches and long steps less than it needs there, and one that has time enough more: a
    30B beside a 13B took 2.1 to 2.3 times what it takes alone, and 1.6 with tokens that are due.

    Then, where targets are so tight that turns would make everybody late, the model with the oldest
    sequence, so that some are in time, until it is `OVERDRAFT` ahead of its share; and else whoever
    is furthest behind its share of the time: batches that are full are then decoded more often than
    small ones, which cost nearly as much, and nobody waits for long.

    Args:
      paces: of all models of the unit.
      unit: the unit.
      now: seconds.
      total: the strain, see `strain.py`.

    Returns:
      The models, and when the next tokens are due of those that are not first for that.
    """
    due: list[tuple[float, str]] = []
    others: list[str] = []
    next_due = math.inf
    turns = total <= 1.0
    whole = turns and any(pace.tight for pace in paces.values())
    for model, state in unit.models.items():
        pace = paces[model]
        if not state.running:
            pace.rests()
            continue
        latest = pace.latest_decode(whole)
        if latest <= now:
            due.append((latest, model))
        else:
            next_due = min(next_due, latest)
            others.append(model)
            turns = turns or not pace.tight

    def place(model: str) -> tuple[int, float]:
        turn: Turn = (model, "decode")
        if turns or unit.time.credit(turn) < -OVERDRAFT:
            return 1, unit.time.virtual(turn)
        return 0, next(iter(unit.models[model].running.values())).order

    return [model for _, model in sorted(due)] + sorted(others, key=place), next_due
