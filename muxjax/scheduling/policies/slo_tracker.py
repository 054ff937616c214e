"""What latency targets ask of the next steps: which prompts are due, and whose tokens.

For each model (`SloTracker`):

- *Tokens*: with a target for each token, after `k` of them the next are due when the time that the
  target gives for `k` has passed. What follows for the order of decodes is in `decode_order.py`.
- *Prompts*: a prefill step costs something however few prompts it takes, and that is time in
  which nobody decodes. So prompts wait for each other, until all of them together have waited as
  long as the sequences that decode would lose by a step more (the rule of ski rental: at most twice
  what knowledge of the future would give), or until their targets allow no more: those of the
  shortest outputs, as long as the model keeps its targets.
- *Lost causes*: a request that would miss its target even if it began now is deferred, see
  `lost_causes.py`.

How long an output will be is not known: the mean of what the model has made so far stands for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.policies.slo_utilization import SloUtilization
from muxjax.scheduling.requests import Request
from muxjax.scheduling.scheduler import Scheduler

SPEED_WEIGHT = 0.1
"""Weight of a new measurement of the seconds a token, against all before it."""
LOOKED_AT_PART = 0.1
"""Of the time that the first in line can still wait, after which that is worked out again."""
LEAST_MODELS = 5
"""Models at once, one sequence each, that targets must allow for taking turns to be worth it. Where
they are so tight that few can run at once, one after the other is better than all a bit slower."""
TOKENS_PART = 0.98
"""Of the time a token that a target for the whole request allows. The first token takes the rest:
at 1 every fourth request of a 30B beside a 13B was just late. Less makes others wait for nothing:
at 0.8 the whole fleet served 2 % less."""
SLOWEST = 0.8
"""How slow a request is taken to be at worst where targets are tight when it is called a lost
cause, in parts of what its target allows: with 1 a hundredth fewer were in time."""
BURST_PART = 0.25
"""Of what a prompt can spare, the part that a decode burst may last: it may meet one that has just
begun, and one behind it, and others' prefills. With a half 5 to 10 % less was served in time, of
three small models below saturation."""
MARGIN = 1.1
"""How much longer than expected a request is taken to run when it is called a lost cause."""


class SloTracker:
    """One model's targets, and how it keeps up with them.

    Args:
      state: the model.
      estimates: step durations of the unit.

    Attributes:
      due: when its next tokens are due.
      speed: seconds for each token of a sequence, waiting for other models included.
      saved: seconds that one prefill of two prompts of mean length saves, against two.
      spare: seconds that a decode burst may last, for such a prompt if it came now.
      tight: whether the target for tokens allows less than `LEAST_MODELS` models, one sequence
        each, to take turns.
      owes: whether it has a target for each token.
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
        self._head: Request | None = None
        self._look_at = 0.0
        self.owes = self._targets.tpot is not None
        self._find_tpot()
        self.look()

    def look(self) -> None:
        """Works out anew what depends on step times alone."""
        tokens = self.mean_prompt()
        self.saved = self._saved(tokens)
        self.spare = BURST_PART * self._spare(round(tokens))
        self.tight = LEAST_MODELS * self._estimates.decode(self._name, 1) > self.tpot()
        limits = self.state.spec.limits
        self._most = min(limits.max_prefill_seqs, math.ceil(limits.max_prefill_tokens / tokens))
        self._wait: tuple[Request | None, int, float, float] = (None, 0, 0.0, 0.0)

    # Targets

    def isolated_tpot(self) -> float:
        """Seconds a token, for a request that is alone."""
        return self._targets.isolated_tpot or self._estimates.decode(self._name, 1)

    def isolated_ttft(self, tokens: int) -> float:
        """Seconds to the first token of a request of so many that is alone."""
        given = self._targets.isolated_ttft
        if given is not None:
            return given * tokens / self.mean_prompt()
        return self._estimates.prefill(self._name, tokens)

    def ttft(self, tokens: int) -> float:
        """Seconds to the first token of a request of so many that the target allows."""
        targets = self._targets
        return targets.scale * self.isolated_ttft(tokens) if targets.ttft is None else targets.ttft

    def tpot(self) -> float:
        """Seconds for each token that the target allows."""
        return self._tpot

    def mean_prompt(self) -> float:
        """Tokens of a prompt, as expected."""
        return max(1.0, self.state.spec.load.prompt_tokens)

    def mean_output(self) -> float:
        """Tokens that a request is expected to make, if it may make as many."""
        state = self.state
        mean = state.spec.load.output_tokens
        if state.finished:
            # What was expected counts as ten requests.
            mean = (10 * mean + state.output_tokens) / (10 + state.finished)
        return max(1.0, mean)

    def allowed(self) -> float:
        """Seconds that a request of mean length may take in all."""
        return self.ttft(round(self.mean_prompt())) + self.mean_output() * self.tpot()

    def latest_start(self, request: Request) -> float:
        """When the request's prefill must begin for it to meet its target, as things go."""
        return self.latest_starts([request])[0]

    def latest_starts(self, requests: Iterable[Request]) -> list[float]:
        """`latest_start` of each."""
        targets, name, prefill = self._targets, self._name, self._estimates.prefill
        ttft, scale = targets.ttft, targets.scale
        if ttft is not None:
            return [r.arrival + ttft - prefill(name, len(r.prompt)) for r in requests]
        if targets.tpot is not None:
            # Of a target for tokens, prompts may take nothing.
            return [r.arrival + (scale - 1) * self.isolated_ttft(len(r.prompt)) for r in requests]
        mean, isolated_tpot = self.mean_output(), self.isolated_tpot()
        speed = self.speed
        if self.tight:
            # Not all take turns then: who begins need not be as slow as those before.
            speed = min(speed, SLOWEST * self.tpot())
        speed = max(speed, self._estimates.decode(name, len(self.state.running) + 1))
        given, mean_prompt = targets.isolated_ttft, self.mean_prompt()
        starts = []
        for request in requests:
            tokens = len(request.prompt)
            steps = min(float(request.max_new_tokens), mean) - 1
            first = prefill(name, tokens)  # half of what this costs, so it is asked for once
            alone = first if given is None else given * tokens / mean_prompt
            spare = scale * (alone + steps * isolated_tpot)
            starts.append(request.arrival + spare - MARGIN * (first + steps * speed))
        return starts

    def _find_tpot(self) -> None:
        targets = self._targets
        self._tpot = targets.tpot or targets.scale * self.isolated_tpot()

    # What was done

    def began_decode(self, tokens: int, now: float) -> None:
        """Notes that a burst of so many tokens was submitted."""
        if self._last is not None and self._tokens:
            seconds = (now - self._last) / self._tokens
            old = self.speed
            self.speed = seconds if not old else old + SPEED_WEIGHT * (seconds - old)
        self._last, self._tokens = now, tokens
        self._find_tpot()
        allowed = tokens * self.tpot()
        if self._targets.tpot is None:
            allowed *= TOKENS_PART
            self.due = min(self.due, now)  # who begins later has nothing of tokens that were early
        self.due = max(self.due, now - allowed) + allowed

    def latest_decode(self, whole: bool = False) -> float:
        """When a step must begin for the next tokens to be in time; never without a target.

        Args:
          whole: whether targets for whole requests count, not for tokens alone.
        """
        if self._targets.tpot is None:
            return self.due if whole else math.inf
        return self.due - self._estimates.decode(self._name, len(self.state.running))

    def load(self) -> float:
        """The part of the time that its sequences need to keep to their targets."""
        return self._estimates.decode(self._name, len(self.state.running)) / self.tpot()

    def rests(self) -> None:
        """Notes that there is nothing to decode: the time until there is does not count."""
        self._last = None

    # Prompts

    def defer_lost(self, unit: Scheduler, now: float) -> None:
        """Defers those of the prompts that are next which would be late even if they began now."""
        state = self.state
        head = state.first
        if head is None or (head is self._head and now < self._look_at):
            return
        spare = math.inf
        first = itertools.islice(state.waiting.values(), state.spec.limits.max_prefill_seqs)
        some = [one for one in first if not one.deferred and not one.preemptions]
        for request, latest in zip(some, self.latest_starts(some), strict=True):
            if latest < now:
                unit.defer(request)
            else:
                spare = min(spare, latest - now)
        # The time that is left is a guess, and is looked at again when a part has passed.
        self._head = state.first
        self._look_at = now + LOOKED_AT_PART * spare

    def patience(self, running: int, now: float) -> float:
        """Seconds that the model's prompts may still wait for others; 0 or less: they are due.

        Args:
          running: sequences of all models, which a prefill step holds up.
          now: seconds.
        """
        state = self.state
        if state.prefilling:
            return 0.0
        count = len(state.waiting)
        if count >= self._most:
            return 0.0
        head = state.first
        if head is None:
            raise ValueError(f"{self._name} has no prompts that could wait")
        if self._wait[:2] != (head, count):
            tokens = count * self.mean_prompt()
            # They came one after the other, so that on average they waited half as long as the
            # first.
            each = 2 * self._saved(tokens) / (count + 1)
            self._wait = head, count, each, self._spare(len(head.prompt))
        _, _, each, spare = self._wait
        return min(running * each, spare) - (now - head.arrival)

    def may_begin(self, unit: Scheduler, strain: SloUtilization) -> bool:
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

    def _spare(self, tokens: int) -> float:
        """Seconds that a prompt may lose before its prefill begins.

        Without a target for the first token, what one may lose whose output is a single token, as
        nobody knows which ones are so short; but any time at all where the model does not keep its
        targets as it is, since then what counts is how much gets done.
        """
        if self._targets.ttft is None and self.speed > self.tpot():
            return math.inf
        return self.ttft(tokens) - self._estimates.prefill(self._name, tokens)

    def _saved(self, tokens: float) -> float:
        """Seconds that one prefill of twice as many tokens saves, against two."""
        once, twice = (self._estimates.prefill(self._name, round(n * tokens)) for n in (1, 2))
        return 2 * once - twice
