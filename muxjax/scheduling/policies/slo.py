"""`slo`: steps in the order that latency targets require, one program at a time.

1. Prefills that are due go first (`slo_tracker.py`), until they are ahead of their shares by their
   part of `PREFILL_OVERDRAFT`, as in `adbs`. Prefills that can still meet a target for the first
   token go before the others. The model furthest behind its share of the time is next. If more
   sequences would make all of them late (`slo_utilization.py`), prompts without a target for the
   first token wait until running sequences end.
2. Then decodes, in the order of `SloPolicy._order_decodes`.
3. Then prefills beyond their shares, and prompts that could still wait, so that no time is idle.

A decode burst lasts no longer than a new prompt would wait for other prompts: few running sequences
have short bursts, many have long ones. A burst ends earlier if prompts become due, or tokens of a
model with a target for each token. It has at least `min_burst_tokens`, since a step has a fixed
cost, unless the targets of some model are tight.

Shares with a bounded overdraft, deadlines that pass, and recalls of deferred requests
(`deferral.py`) prevent starvation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from muxjax.scheduling.fair_share import StepKey
from muxjax.scheduling.policies.adbs import PREFILL_OVERDRAFT
from muxjax.scheduling.policies.chunk_size import prefill_chunk_tokens
from muxjax.scheduling.policies.deferral import DeferralQueue
from muxjax.scheduling.policies.interface import Policy, Proposal, SchedulerView, StepProposal
from muxjax.scheduling.policies.slo_tracker import SloTracker
from muxjax.scheduling.policies.slo_tuning import DEFAULT_TUNING, SloTuning
from muxjax.scheduling.policies.slo_utilization import SloUtilization
from muxjax.scheduling.steps import Prefill, Step


class SloPolicy(Policy):
    """`slo`, one program at a time.

    Args:
      tuning: constants.
    """

    name = "slo"

    def __init__(self, tuning: SloTuning = DEFAULT_TUNING) -> None:
        self._tuning = tuning
        self._trackers: dict[str, SloTracker] = {}
        self._tracker_list: list[SloTracker] = []
        self._deferral = DeferralQueue([], tuning)
        self._utilization = SloUtilization(tuning)
        self._models_version = -1  # version that the trackers were created for
        self._last_model = ""  # model of the last step, whose estimates may have changed
        # Over all models: least batching gain and burst limit, see `SloTracker`.
        self._batching_gain = self._max_burst_seconds = 0.0
        self._any_tight = self._any_token_target = False
        self._is_chunked = False  # whether the last step was a chunk of a longer prefill
        self._proposes_chunk = False  # the same, after the proposed step

    def propose(self, view: SchedulerView, now: float) -> Iterator[Proposal]:
        self._update_trackers(view)
        utilization = self._utilization
        utilization.update(self._trackers, view, now)
        yield from self._deferral.propose(view, utilization, now)
        prefills, decodes = view.backlog()
        running = 0
        for tracker in self._tracker_list:
            if tracker.state.running:
                running += len(tracker.state.running)
            else:
                tracker.note_idle()
        due, beyond_share, early, pause = self._sort_prefills(view, prefills, running, now)
        tokens_due = self._tokens_due(decodes)
        # Prefills are chunked if tokens are due. Those are decoded between two chunks.
        if not (self._is_chunked and tokens_due <= now):
            yield from self._propose_prefills(view, due, tokens_due - now)
        order, next_due = self._order_decodes(view, decodes, now)
        seconds = min(pause, next_due - now)
        for model in order:
            yield self._decode(view, model, seconds)
        yield from self._propose_prefills(view, due + beyond_share, math.inf)
        for model in early:
            self._proposes_chunk = self._is_chunked
            yield StepProposal(model, "prefill")

    def on_scheduled(self, view: SchedulerView, step: Step, now: float) -> None:
        del view
        self._last_model = step.model
        if isinstance(step, Prefill):
            self._is_chunked = self._proposes_chunk
        else:
            self._is_chunked = False
            self._trackers[step.model].note_decode(step.num_tokens, now)

    def _update_trackers(self, view: SchedulerView) -> None:
        """Updates values that depend on step durations, which changed for the last model only."""
        if self._models_version != view.models_version:
            self._models_version = view.models_version
            tuning, estimates = self._tuning, view.estimates
            self._trackers = {
                name: SloTracker(state, estimates, tuning) for name, state in view.models.items()
            }
            self._tracker_list = list(self._trackers.values())
            self._deferral = DeferralQueue(self._tracker_list, tuning)
        elif self._last_model:
            self._trackers[self._last_model].update()
        else:
            return
        self._last_model = ""
        trackers = self._tracker_list
        self._batching_gain = min([tracker.batching_gain for tracker in trackers])
        self._max_burst_seconds = min([tracker.max_burst_seconds for tracker in trackers])
        self._any_tight = any(tracker.is_tight for tracker in trackers)
        self._any_token_target = any(tracker.has_token_target for tracker in trackers)

    # Prefills

    def _tokens_due(self, decodes: list[StepKey]) -> float:
        """Latest start of a step such that all targets for single tokens are met, in seconds."""
        if not self._any_token_target:
            return math.inf
        trackers = self._trackers
        return min([trackers[model].latest_decode() for model, _ in decodes], default=math.inf)

    def _sort_prefills(
        self, view: SchedulerView, prefills: list[StepKey], running: int, now: float
    ) -> tuple[list[str], list[str], list[str], float]:
        """Sorts the models that may prefill.

        Args:
          view: state of the scheduler.
          prefills: keys that have prompts.
          running: running sequences of all models.
          now: current time, in seconds.

        Returns:
          Models whose prompts are due; models whose prompts are due but beyond their shares; models
          whose prompts can wait; and how long decodes may last until prompts are due, in seconds.
        """
        fair_share = view.fair_share
        shares, virtual_time = fair_share.shares, fair_share.virtual_time
        # How long a prompt of the most urgent model would wait for others if it arrived now.
        pause = min(
            running * self._batching_gain, self._max_burst_seconds, self._tuning.max_burst_seconds
        )
        # Virtual time at which a model's prefills have used up their part of the overdraft.
        limit = fair_share.mean_virtual_time + PREFILL_OVERDRAFT / (
            sum([shares[key] for key in prefills]) or 1.0
        )
        due: list[tuple[tuple[int, float], str]] = []
        beyond_share: list[str] = []
        early: list[tuple[float, str]] = []
        for key in prefills:
            model = key[0]
            if not view.may_prefill(model):
                continue
            tracker = self._trackers[model]
            patience, virtual = tracker.patience(running, now), virtual_time(key)
            if patience > 0 and running:
                early.append((patience, model))
                pause = min(pause, patience)
            elif virtual <= limit:
                due.append((tracker.prefill_order(virtual, now), model))
            else:
                beyond_share.append(model)
        due_models = [model for _, model in sorted(due)]
        return due_models, beyond_share, [model for _, model in sorted(early)], pause

    def _propose_prefills(
        self, view: SchedulerView, models: list[str], seconds: float
    ) -> Iterator[StepProposal]:
        """Prefills of models whose prompts need not wait, chunked if they would last too long.

        Args:
          view: state of the scheduler.
          models: the models, best first.
          seconds: time that other models can wait for their tokens, in seconds.
        """
        for model in models:
            tracker = self._trackers[model]
            if self._utilization.may_prefill(tracker, view):
                spec = tracker.state.spec
                tokens = prefill_chunk_tokens(spec, view.estimates, seconds)
                self._proposes_chunk = tokens < spec.limits.max_prefill_tokens
                yield StepProposal(model, "prefill", tokens)

    # Decodes

    def _order_decodes(
        self, view: SchedulerView, decodes: list[StepKey], now: float
    ) -> tuple[list[str], float]:
        """Orders the models with sequences to decode.

        Models whose next tokens are due go first, earliest deadline first. Deadlines follow from
        targets for each token. Targets for whole requests count only if those of some model are
        tight and there is time to meet all of them. Shares alone would then give a model of small
        batches and long steps too little time. Without enough time for all, deadlines would make
        all requests slightly late.

        The other models follow by shares of the time, furthest behind first, so that full batches
        are decoded more often than small ones. If the targets of all these models are too tight
        for turns, the model with the oldest sequence goes first until it is `decode_overdraft`
        ahead of its share. Some requests are then in time, where turns would make all of them late.

        Args:
          view: state of the scheduler.
          decodes: keys that have sequences to decode.
          now: current time, in seconds.

        Returns:
          The models, best first; and the earliest deadline that is still ahead, in seconds.
        """
        tuning, trackers = self._tuning, self._trackers
        due: list[tuple[float, str]] = []
        others: list[StepKey] = []
        next_due = math.inf
        take_turns = False
        request_targets = self._any_tight and self._utilization.leaves_room(tuning.pace_part)
        for key in decodes:
            tracker = trackers[key[0]]
            latest = tracker.latest_decode(request_targets)
            if latest <= now:
                due.append((latest, key[0]))
            else:
                next_due = min(next_due, latest)
                others.append(key)
                take_turns = take_turns or not tracker.is_tight
        fair_share = view.fair_share
        others.sort(key=fair_share.virtual_time)
        if not take_turns and not request_targets:

            def by_age(key: StepKey) -> tuple[int, int]:
                tracker = trackers[key[0]]
                seconds = tracker.mean_output() * tracker.isolated_tpot()
                if fair_share.credit(key) < -tuning.decode_overdraft * seconds:
                    return 1, 0
                return 0, next(iter(tracker.state.running.values())).order

            others.sort(key=by_age)
        return [model for _, model in sorted(due)] + [model for model, _ in others], next_due

    def _decode(self, view: SchedulerView, model: str, seconds: float) -> StepProposal:
        """A decode burst of about `seconds`."""
        tuning = self._tuning
        token = view.estimates.decode(model, len(view.models[model].running))
        shortest = 0
        if not self._any_tight:
            shortest = min(tuning.min_burst_tokens, int(tuning.min_burst_seconds / token))
        return StepProposal(model, "decode", max(shortest, int(seconds / token)))
