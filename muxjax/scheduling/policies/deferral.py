"""Deferral of requests that can no longer meet their SLO, for the `slo` policy.

A request that would miss its target even if it began now is deferred, once: it runs behind feasible
requests, on leftover capacity. Under overload this keeps the others in time; otherwise all prompts
would wait until the last moment and be late.

While deferred requests are few, they are recalled as soon as their model has no other prompt. Many
deferred requests mean more load than capacity. They are then recalled only if no model that shares
the time has a request that can be in time. Two rules prevent starvation:

- for every `recall_interval` requests that end, the oldest deferred request is recalled;
- a model with at most `minor_part` of the deferred requests, which does not cause the overload,
  recalls them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from muxjax.scheduling.policies.interface import Defer, Recall, SchedulerView
from muxjax.scheduling.policies.slo_tracker import SloTracker
from muxjax.scheduling.policies.slo_tuning import DEFAULT_TUNING, SloTuning
from muxjax.scheduling.policies.slo_utilization import SloUtilization


class DeferralQueue:
    """Defers and recalls requests of models that share the time.

    Args:
      trackers: the models.
      tuning: constants.
    """

    def __init__(self, trackers: Sequence[SloTracker], tuning: SloTuning = DEFAULT_TUNING) -> None:
        self._trackers = trackers
        self._tuning = tuning
        self._num_intervals = 0

    def propose(
        self, view: SchedulerView, utilization: SloUtilization, now: float
    ) -> Iterator[Defer | Recall]:
        """Defers late requests among the next prompts of each model, and recalls deferred ones.

        Args:
          view: state of the scheduler.
          utilization: limits how many sequences may begin.
          now: current time, in seconds.
        """
        num_deferred = 0
        for tracker in self._trackers:
            if tracker.state.first is not None:
                yield from tracker.defer_late(now)
            num_deferred += len(tracker.state.deferred)
        if num_deferred:
            yield from self._recall(view, utilization, num_deferred, now)

    def _recall(
        self, view: SchedulerView, utilization: SloUtilization, num_deferred: int, now: float
    ) -> Iterator[Recall]:
        tuning, trackers = self._tuning, self._trackers
        deferring = [tracker for tracker in trackers if tracker.state.deferred]
        finished = sum([tracker.state.finished for tracker in trackers])
        num_intervals = finished // tuning.recall_interval
        if num_intervals > self._num_intervals:
            firsts = [next(iter(tracker.state.deferred.values())) for tracker in deferring]
            yield Recall(min(firsts, key=lambda request: request.arrival).model)
        self._num_intervals = num_intervals
        running = sum([len(tracker.state.running) for tracker in trackers])
        many = num_deferred > max(tuning.few_requests, tuning.few_part * running)
        wait = many and any(_has_feasible(tracker, now) for tracker in trackers)
        for tracker in deferring:
            state = tracker.state
            is_minor = len(state.deferred) <= tuning.minor_part * num_deferred
            if state.waiting or (wait and not is_minor):
                continue
            count = min(state.spec.limits.max_prefill_seqs, len(state.deferred))
            while count and not utilization.allows(tracker, view, count):
                count //= 2
            for _ in range(count):
                yield Recall(state.spec.name)


def _has_feasible(tracker: SloTracker, now: float) -> bool:
    """Whether a model has requests that can be in time.

    Such a request was never deferred and is younger than the latency allowed for a request of mean
    length. Without the age limit, a very long request would count until its end.
    """
    state, since = tracker.state, now - tracker.allowed_latency()
    groups = state.waiting, state.prefilling, state.running
    return any(
        not request.deferred and request.arrival > since
        for group in groups
        for request in group.values()
    )
