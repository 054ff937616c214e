"""Policies of other servers, to compare with. Their pools are in `pools.py`.

- `fcfs`: requests of all models in one line; `temporal` is the same on a pool that is not divided,
  as servers have it that swap models in time (AlpaServe: Li et al., OSDI 2023).
- `round_robin`: models in turn, one step each.
- `static`: a share of the time and of the pool for each model, fixed when the unit starts.
- `mutex`: models that know nothing of each other and take turns behind one lock, as they happen to
  get it; each has its own part of the pool (as Saxml's models have their slots).
"""

from __future__ import annotations

import random

from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Step


class Fcfs:
    """`fcfs`: one line for all models.

    Prefixes in order of arrival over all models go first; if the first in line cannot go, nobody
    overtakes it. Otherwise the model decodes whose oldest running request came first.
    """

    name = "fcfs"

    def next_step(self, unit: Scheduler, now: float) -> Step | None:
        del now
        states = unit.models.items()
        # Started prefixes hold pages, so they end before new ones begin.
        started = [
            (next(iter(state.prefilling.values())).order, model)
            for model, state in states
            if state.prefilling
        ]
        waiting = [(state.first.order, model) for model, state in states if state.first is not None]
        line = started or waiting
        if line:
            prefill = unit.make_prefill(min(line)[1])
            if prefill is not None:
                return prefill
        running = [
            (next(iter(state.running.values())).order, model)
            for model, state in states
            if state.running
        ]
        for _, model in sorted(running):
            decode = unit.make_decode(model)
            if decode is not None:
                return decode
        return None


class Temporal(Fcfs):
    """`temporal`: the order of `fcfs`. What sets them apart is the pool."""

    name = "temporal"


class RoundRobin:
    """`round_robin`: models in turn; a turn is a prefill if one can be made, otherwise a decode."""

    name = "round_robin"

    def __init__(self) -> None:
        self._next = 0

    def next_step(self, unit: Scheduler, now: float) -> Step | None:
        del now
        models = list(unit.models)
        for offset in range(len(models)):
            index = (self._next + offset) % len(models)
            step = _own_step(unit, models[index])
            if step is not None:
                self._next = index + 1
                return step
        return None


class Static:
    """`static`: models in proportion to shares of the time that are fixed when the unit starts.

    Shares are the expected needs of that moment. A model's prefills go before its decodes. Time
    that a model does not use goes to the others, which no fixed slots would do: a kind baseline.
    """

    name = "static"

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}
        self._virtual: dict[str, float] = {}
        self._working: set[str] = set()
        self._membership = -1  # `unit.membership` that shares were fixed for

    def next_step(self, unit: Scheduler, now: float) -> Step | None:
        del now
        if self._membership != unit.membership:
            self._membership = unit.membership
            self._shares = dict.fromkeys(unit.models, 0.0)
            for (model, _), share in unit.time.shares.items():
                self._shares[model] += share
            self._virtual = {model: self._virtual.get(model, 0.0) for model in unit.models}
            self._working &= set(unit.models)
        virtual = self._virtual
        working = [m for m, state in unit.models.items() if state.has_prefill or state.has_decode]
        stayed = [virtual[model] for model in working if model in self._working]
        for model in working:
            if model not in self._working:  # who comes back has no credit
                virtual[model] = max(virtual[model], min(stayed, default=virtual[model]))
        self._working = set(working)
        for model in sorted(working, key=lambda m: virtual[m]):
            step = _own_step(unit, model)
            if step is not None:
                virtual[model] += unit.expected_time(step)[1] / self._shares[model]
                return step
        return None


class Mutex:
    """`mutex`: whichever model gets the lock makes one step, a prefill if it can.

    Who gets it is drawn at random, from a fixed seed, among those that have work.
    """

    name = "mutex"

    def __init__(self) -> None:
        self._random = random.Random(0)

    def next_step(self, unit: Scheduler, now: float) -> Step | None:
        del now
        line = [m for m, state in unit.models.items() if state.has_prefill or state.has_decode]
        self._random.shuffle(line)
        for model in line:
            step = _own_step(unit, model)
            if step is not None:
                return step
        return None


def _own_step(unit: Scheduler, model: str) -> Step | None:
    """A prefill of the model if one can be made, otherwise a decode."""
    state = unit.models[model]
    step: Step | None = None
    if state.has_prefill:
        step = unit.make_prefill(model)
    if step is None and state.has_decode:
        step = unit.make_decode(model)
    return step
