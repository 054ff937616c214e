"""Baselines: the policies of other servers. `registry.py` lists how each divides the pool.

- `fcfs`: requests of all models in one queue. `temporal` is the same on a pool that is not divided,
  as in servers that swap models over time (AlpaServe: Li et al., OSDI 2023).
- `round_robin`: models in turn, one step each.
- `static`: a share of the time and of the pool for each model, fixed when the unit starts.
- `mutex`: independent models behind one lock, acquired in random order. Each has a fixed part of
  the pool, like the slots of Saxml's models.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from muxjax.scheduling.policies.interface import Policy, SchedulerView, StepProposal
from muxjax.scheduling.steps import Step


class Fcfs(Policy):
    """`fcfs`: one queue for all models.

    The first prefix in order of arrival over all models goes first; if it cannot run, no later one
    overtakes it. Otherwise the model with the oldest running request decodes.
    """

    name = "fcfs"

    def propose(self, view: SchedulerView, now: float) -> Iterator[StepProposal]:
        del now
        states = view.models.items()
        # Started prefixes hold pages, so they end before new ones begin.
        started = [
            (next(iter(state.prefilling.values())).order, model)
            for model, state in states
            if state.prefilling
        ]
        waiting = [(state.first.order, model) for model, state in states if state.first is not None]
        queue = started or waiting
        if queue:
            yield StepProposal(min(queue)[1], "prefill")
        running = [
            (next(iter(state.running.values())).order, model)
            for model, state in states
            if state.running
        ]
        for _, model in sorted(running):
            yield StepProposal(model, "decode")


class Temporal(Fcfs):
    """`temporal`: the order of `fcfs`; the difference is the pool."""

    name = "temporal"


class RoundRobin(Policy):
    """`round_robin`: models in turn, each with a prefill if possible, otherwise a decode."""

    name = "round_robin"

    def __init__(self) -> None:
        self._next = 0

    def propose(self, view: SchedulerView, now: float) -> Iterator[StepProposal]:
        del now
        models = list(view.models)
        first = self._next % len(models)
        return _prefill_then_decode(view, models[first:] + models[:first])

    def on_scheduled(self, view: SchedulerView, step: Step, now: float) -> None:
        del now
        self._next = list(view.models).index(step.model) + 1


class Static(Policy):
    """`static`: models in proportion to shares of the time that are fixed when the unit starts.

    The shares follow the expected demand at that time. A model's prefills go before its decodes.
    Time that a model does not use goes to the others; fixed time slots would leave it idle.
    """

    name = "static"

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}
        self._virtual_time: dict[str, float] = {}
        self._active: set[str] = set()
        self._models_version = -1  # version that the shares were fixed for

    def propose(self, view: SchedulerView, now: float) -> Iterator[StepProposal]:
        del now
        if self._models_version != view.models_version:
            self._models_version = view.models_version
            self._shares = dict.fromkeys(view.models, 0.0)
            for (model, _), share in view.fair_share.shares.items():
                self._shares[model] += share
            before = self._virtual_time
            self._virtual_time = {model: before.get(model, 0.0) for model in view.models}
            self._active &= set(view.models)
        virtual_time = self._virtual_time
        active = [m for m, state in view.models.items() if state.has_prefill or state.has_decode]
        stayed = [virtual_time[model] for model in active if model in self._active]
        for model in active:
            if model not in self._active:  # a model that was idle has no credit
                virtual_time[model] = max(
                    virtual_time[model], min(stayed, default=virtual_time[model])
                )
        self._active = set(active)
        active.sort(key=lambda model: virtual_time[model])
        return _prefill_then_decode(view, active)

    def on_scheduled(self, view: SchedulerView, step: Step, now: float) -> None:
        del now
        model = step.model
        self._virtual_time[model] += view.estimates.step_seconds(step) / self._shares[model]


class Mutex(Policy):
    """`mutex`: the model that gets the lock runs one step, a prefill if possible.

    The order is drawn at random, from a fixed seed, among the models that have work.
    """

    name = "mutex"

    def __init__(self) -> None:
        self._random = random.Random(0)

    def propose(self, view: SchedulerView, now: float) -> Iterator[StepProposal]:
        del now
        order = [m for m, state in view.models.items() if state.has_prefill or state.has_decode]
        self._random.shuffle(order)
        return _prefill_then_decode(view, order)


def _prefill_then_decode(view: SchedulerView, order: list[str]) -> Iterator[StepProposal]:
    """For each model a prefill and, if that is impossible, a decode."""
    for model in order:
        state = view.models[model]
        if state.has_prefill:
            yield StepProposal(model, "prefill")
        if state.has_decode:
            yield StepProposal(model, "decode")
