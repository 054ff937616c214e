"""Policies for prefills and decodes of several models that run concurrently, as in MuxServe.

One prefill runs at a time. Decodes of other models, and of other sequences of the same model, run
concurrently within their shares of the chip (`ComputeShares`). A sequence is in one step at a time,
so steps may end in any order.

- `adbs`: MuxServe's Algorithm 3 (Duan et al., ICML 2024, section 3.4).
- `round_robin`: the order of `adbs` without KV quotas.
- `fcfs`: one queue for all models; no model overtakes the first one.
- `static`: a separate part of the chip for each model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.scheduling.fair_share import Phase, StepKey
from muxjax.scheduling.policies.interface import (
    Defer,
    Policy,
    Proposal,
    Recall,
    SchedulerView,
    StepProposal,
)
from muxjax.scheduling.steps import Prefill, Step


class ConcurrentAdaptiveBatch(Policy):
    """`adbs`: prefills first, models in turn; then decodes, models in turn.

    While a prefill waits only for compute that decodes use, no decode is started, to free the chip.
    A prefill blocked for lack of pages does not delay decodes; it is retried after a request ends.

    Args:
      compute: shares of the chip.

    Attributes:
      single_prefill: whether one prefill runs at a time.
    """

    name = "adbs"
    single_prefill = True

    def __init__(self, compute: ComputeShares) -> None:
        self._compute = compute
        self._last: dict[Phase, str] = {}
        self._refused: dict[str, int] = {}

    def propose(self, view: SchedulerView, now: float) -> Iterator[Proposal]:
        running = view.in_flight_keys()
        yield from self._change_queues(view, now)
        if not (self.single_prefill and any(phase == "prefill" for _, phase in running)):
            waits_for_compute = False
            for model in self._select_prefills(view, now):
                if not self._compute.fits((model, "prefill"), running):
                    waits_for_compute |= self._may_have_pages(view, model)
                    continue
                yield StepProposal(model, "prefill")
                self._refused[model] = _num_finished(view)
            if waits_for_compute and self.single_prefill:
                return
        for model in self._select_decodes(view):
            if self._compute.fits((model, "decode"), running):
                yield StepProposal(model, "decode")

    def on_scheduled(self, view: SchedulerView, step: Step, now: float) -> None:
        del view, now
        self._last["prefill" if isinstance(step, Prefill) else "decode"] = step.model

    def _change_queues(self, view: SchedulerView, now: float) -> Iterable[Defer | Recall]:
        """Requests to defer or recall before the models are selected."""
        del view, now
        return ()

    def _select_prefills(self, view: SchedulerView, now: float) -> list[str]:
        """Models whose prefill may start now, in order."""
        del now
        return [m for m in self._in_turn(view, "prefill") if view.models[m].has_prefill]

    def _select_decodes(self, view: SchedulerView) -> list[str]:
        """Models whose decode may start now, in order."""
        return [m for m in self._in_turn(view, "decode") if view.models[m].has_decode]

    def _in_turn(self, view: SchedulerView, phase: Phase) -> list[str]:
        """All models in turn, from the successor of the last scheduled model."""
        models = list(view.models)
        last = self._last.get(phase)
        first = 0 if last is None else models.index(last) + 1
        return models[first:] + models[:first]

    def _may_have_pages(self, view: SchedulerView, model: str) -> bool:
        """Whether there may be pages and a slot for a prefill."""
        if not view.models[model].free_slots:
            return bool(view.models[model].prefilling)
        return self._refused.get(model) != _num_finished(view)


class ConcurrentRoundRobin(ConcurrentAdaptiveBatch):
    """`round_robin`: the order of `adbs`, with a pool without quotas."""

    name = "round_robin"


class ConcurrentStatic(ConcurrentAdaptiveBatch):
    """`static`: a separate part of the chip for each model.

    One program of a model runs at a time, prefills first.
    """

    name = "static"
    single_prefill = False

    def _select_prefills(self, view: SchedulerView, now: float) -> list[str]:
        return self._without_steps(view, super()._select_prefills(view, now))

    def _select_decodes(self, view: SchedulerView) -> list[str]:
        return self._without_steps(view, super()._select_decodes(view))

    @staticmethod
    def _without_steps(view: SchedulerView, models: list[str]) -> list[str]:
        """The models without a step in flight."""
        busy = {model for model, _ in view.in_flight_keys()}
        return [model for model in models if model not in busy]


class ConcurrentFcfs(Policy):
    """`fcfs`: one queue for all models.

    The oldest waiting request of all models is prefilled first, and the model with the oldest
    running request decodes first. Other steps run concurrently only if they do not delay these.

    Args:
      compute: shares of the chip.
    """

    name = "fcfs"

    def __init__(self, compute: ComputeShares) -> None:
        self._compute = compute

    def propose(self, view: SchedulerView, now: float) -> Iterator[StepProposal]:
        del now
        running = view.in_flight_keys()
        if not any(phase == "prefill" for _, phase in running):
            queue = [
                (next(iter(group.values())).order, name)
                for name, state in view.models.items()
                for group in (state.prefilling, state.waiting)
                if group
            ]
            if queue:
                first: StepKey = (min(queue)[1], "prefill")
                if self._compute.fits(first, running):
                    yield StepProposal(first[0], "prefill")
                elif view.models[first[0]].free_slots:
                    return
        for _, model in sorted(_oldest_settled(view)):
            if (model, "decode") in running:
                continue
            if not self._compute.fits((model, "decode"), running):
                return
            yield StepProposal(model, "decode")


def _oldest_settled(view: SchedulerView) -> Iterator[tuple[int, str]]:
    """Order and model of each model's oldest running request without a step in flight."""
    for name, state in view.models.items():
        for request in state.running.values():
            if view.is_settled(request):
                yield request.order, name
                break


def _num_finished(view: SchedulerView) -> int:
    return sum([state.finished for state in view.models.values()])
