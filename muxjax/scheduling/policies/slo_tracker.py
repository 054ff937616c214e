"""Tracks the progress of a model towards its latency targets, for the `slo` policy.

- *Tokens*: after `k` tokens the next ones are due when the time that the target allows for `k`
  tokens has passed. `slo.py` orders decodes by these deadlines.
- *Prompts*: a prefill step has a fixed cost, and no sequence decodes during it. Prompts therefore
  wait for each other until their total wait equals the time that one more step would cost the
  decoding sequences, or until their targets allow no more. By the ski-rental rule, this costs at
  most twice as much as an optimal decision. Output lengths are unknown, so while the model meets
  its targets a prompt counts as one with a single output token.
- *Deferral*: a request that would miss its target even if it began now is deferred; see `slo.py`.

For other decisions, the expected output length is the mean of the model's outputs so far.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.policies.interface import Defer
from muxjax.scheduling.policies.slo_tuning import DEFAULT_TUNING, SloTuning
from muxjax.scheduling.requests import Request


class SloTracker:
    """Latency targets of one model, and its progress towards them.

    Args:
      state: the model.
      estimates: step durations of the unit.
      tuning: constants.

    Attributes:
      state: as given.
      due: time at which the model's next tokens are due, in seconds.
      pace: seconds per token of a running sequence, including steps of other models.
      batching_gain: seconds that one prefill of two prompts of mean length saves, against two.
      max_burst_seconds: maximum duration of a decode burst, so that a new prompt is in time.
      is_tight: whether the target for tokens allows fewer than `min_concurrent_models` to take
        turns.
      has_token_target: whether the model has a target for each token.
    """

    def __init__(
        self, state: ModelState, estimates: StepEstimates, tuning: SloTuning = DEFAULT_TUNING
    ) -> None:
        self.state = state
        self._estimates = estimates
        self._tuning = tuning
        self._name = state.spec.name
        self._targets = state.spec.targets
        self.due = 0.0
        self.pace = 0.0
        self._last_decode: float | None = None
        self._last_tokens = 0
        self._checked_head: Request | None = None
        self._next_check = 0.0
        self.has_token_target = self._targets.tpot is not None
        self._update_tpot()
        self.update()

    def update(self) -> None:
        """Recomputes the values that depend only on the model's step durations."""
        tokens = self.mean_prompt()
        self.batching_gain = self._batching_gain(tokens)
        self.max_burst_seconds = self._tuning.burst_part * self._slack(round(tokens))
        isolated = self._estimates.decode(self._name, 1)
        self.is_tight = self._tuning.min_concurrent_models * isolated > self.tpot()
        limits = self.state.spec.limits
        self._max_batch = min(
            limits.max_prefill_seqs, math.ceil(limits.max_prefill_tokens / tokens)
        )
        # Head and length of the queue; wait per sequence and slack computed for them.
        self._patience: tuple[Request | None, int, float, float] = (None, 0, 0.0, 0.0)

    # Targets

    def isolated_tpot(self) -> float:
        """Time per output token with no other load, in seconds."""
        return self._targets.isolated_tpot or self._estimates.decode(self._name, 1)

    def isolated_ttft(self, tokens: int) -> float:
        """Time to first token, in seconds, of a prompt of `tokens` tokens with no other load."""
        mean = self._targets.isolated_ttft
        if mean is not None:
            return mean * tokens / self.mean_prompt()
        return self._estimates.prefill(self._name, tokens)

    def ttft(self, tokens: int) -> float:
        """Time to first token that the target allows a prompt of `tokens` tokens, in seconds."""
        targets = self._targets
        return targets.scale * self.isolated_ttft(tokens) if targets.ttft is None else targets.ttft

    def tpot(self) -> float:
        """Time per output token that the target allows, in seconds."""
        return self._tpot

    def mean_prompt(self) -> float:
        """Expected tokens of a prompt."""
        return max(1.0, self.state.spec.load.prompt_tokens)

    def mean_output(self) -> float:
        """Expected output tokens of a request without a lower limit."""
        state = self.state
        mean = state.spec.load.output_tokens
        if state.finished:
            prior = self._tuning.prior_requests
            mean = (prior * mean + state.output_tokens) / (prior + state.finished)
        return max(1.0, mean)

    def allowed_latency(self) -> float:
        """Latency that the targets allow a request of mean length, in seconds."""
        return self.ttft(round(self.mean_prompt())) + self.mean_output() * self.tpot()

    def latest_start(self, request: Request) -> float:
        """Time at which the request's prefill must begin for it to meet its target."""
        return self.latest_starts([request])[0]

    def latest_starts(self, requests: Iterable[Request]) -> list[float]:
        """`latest_start` of each request."""
        targets, name, prefill = self._targets, self._name, self._estimates.prefill
        tuning, ttft, scale = self._tuning, targets.ttft, targets.scale
        if ttft is not None:
            return [r.arrival + ttft - prefill(name, len(r.prompt)) for r in requests]
        if targets.tpot is not None:
            # Prompt and output tokens have separate targets.
            return [r.arrival + (scale - 1) * self.isolated_ttft(len(r.prompt)) for r in requests]
        mean, isolated_tpot = self.mean_output(), self.isolated_tpot()
        pace = self.pace
        if self.is_tight:
            # Not all models take turns then, so a new request need not be as slow as earlier ones.
            pace = min(pace, tuning.slowest_pace * self.tpot())
        pace = max(pace, self._estimates.decode(name, len(self.state.running) + 1))
        mean_isolated_ttft, mean_prompt = targets.isolated_ttft, self.mean_prompt()
        starts = []
        for request in requests:
            tokens = len(request.prompt)
            steps = min(float(request.max_new_tokens), mean) - 1
            seconds = prefill(name, tokens)  # most of the cost of this loop, so it is called once
            if mean_isolated_ttft is None:
                isolated_ttft = seconds
            else:
                isolated_ttft = mean_isolated_ttft * tokens / mean_prompt
            allowed = scale * (isolated_ttft + steps * isolated_tpot)
            expected = tuning.duration_margin * (seconds + steps * pace)
            starts.append(request.arrival + allowed - expected)
        return starts

    def _update_tpot(self) -> None:
        targets = self._targets
        self._tpot = targets.tpot or targets.scale * self.isolated_tpot()

    # Tokens

    def note_decode(self, tokens: int, now: float) -> None:
        """Records that a decode of `tokens` tokens per sequence was scheduled."""
        if self._last_decode is not None and self._last_tokens:
            seconds = (now - self._last_decode) / self._last_tokens
            pace = self.pace
            self.pace = pace + self._tuning.pace_weight * (seconds - pace) if pace else seconds
        self._last_decode, self._last_tokens = now, tokens
        self._update_tpot()
        allowed = tokens * self.tpot()
        if self._targets.tpot is None:
            allowed *= self._tuning.pace_part
            self.due = min(self.due, now)  # new sequences gain nothing from tokens that were early
        self.due = max(self.due, now - allowed) + allowed

    def note_idle(self) -> None:
        """Records that nothing decodes, so that idle time does not count towards the pace."""
        self._last_decode = None

    def latest_decode(self, request_targets: bool = False) -> float:
        """Latest start of a step such that the next tokens are in time; infinite without a target.

        Args:
          request_targets: whether targets for whole requests count, besides those for tokens.
        """
        if self._targets.tpot is None:
            return self.due if request_targets else math.inf
        return self.due - self._estimates.decode(self._name, len(self.state.running))

    def utilization(self) -> float:
        """Part of the time that the running sequences need to meet their targets."""
        return self._estimates.decode(self._name, len(self.state.running)) / self.tpot()

    # Prompts

    @property
    def has_first_token_target(self) -> bool:
        """Whether the model has a target for the first token."""
        return self._targets.ttft is not None

    def defer_late(self, now: float) -> Iterator[Defer]:
        """Defers the next prompts that would be late even if they began now."""
        state = self.state
        head = state.first
        if head is None or (head is self._checked_head and now < self._next_check):
            return
        slack = math.inf
        first = itertools.islice(state.waiting.values(), state.spec.limits.max_prefill_seqs)
        requests = [r for r in first if not r.deferred and not r.preemptions]
        for request, latest in zip(requests, self.latest_starts(requests), strict=True):
            if latest < now:
                yield Defer(request)
            else:
                slack = min(slack, latest - now)
        # The slack is an estimate, so it is computed again after a part of it has passed.
        self._checked_head = state.first
        self._next_check = now + self._tuning.check_interval_part * slack

    def patience(self, running: int, now: float) -> float:
        """Seconds that the model's prompts may still wait for others; they are due at 0 or less.

        Args:
          running: running sequences of all models, which a prefill step delays.
          now: current time, in seconds.

        Raises:
          ValueError: the model has no prompt.
        """
        state = self.state
        if state.prefilling:
            return 0.0
        count = len(state.waiting)
        if count >= self._max_batch:
            return 0.0
        head = state.first
        if head is None:
            raise ValueError(f"{self._name} has no prompt that could wait")
        if self._patience[:2] != (head, count):
            tokens = count * self.mean_prompt()
            # Prompts arrive one by one, so their mean wait is half that of the first.
            wait = 2 * self._batching_gain(tokens) / (count + 1)
            self._patience = head, count, wait, self._slack(len(head.prompt))
        _, _, wait, slack = self._patience
        return min(running * wait, slack) - (now - head.arrival)

    def prefill_order(self, virtual_time: float, now: float) -> tuple[int, float]:
        """Sort key among models whose prompts are due; the least is first.

        Prompts that can still meet a target for the first token go first, in the order in which
        they must begin. Then the model furthest behind its share of the time goes, so that a long
        queue of one model does not delay the others.

        Args:
          virtual_time: virtual time of the model's prefills; see `FairShare`.
          now: current time, in seconds.
        """
        if self.has_first_token_target:
            group = self.state.prefilling or self.state.waiting
            latest = min(map(self.latest_start, itertools.islice(group.values(), 1)), default=now)
            if latest >= now:
                return 0, latest
        return 1, virtual_time

    def _slack(self, tokens: int) -> float:
        """Seconds that a prompt may wait before its prefill begins.

        Without a target for the first token, the target of a request with one output token counts.
        Infinite if the model misses its targets, since throughput then matters more.
        """
        if self._targets.ttft is None and self.pace > self.tpot():
            return math.inf
        return self.ttft(tokens) - self._estimates.prefill(self._name, tokens)

    def _batching_gain(self, tokens: float) -> float:
        """Seconds that one prefill of `2 * tokens` tokens saves, against two of `tokens`."""
        single, double = (self._estimates.prefill(self._name, round(n * tokens)) for n in (1, 2))
        return 2 * single - double
