"""Policies where prefills and decodes of several models run side by side, as MuxServe has them.

One prefill runs at a time; decodes of other models, and of the same model's other sequences, run
beside it as far as their shares of the chip go (`ComputeShares`). A sequence is in one step at a
time, so that the order in which steps end does not matter.

- `adbs`: MuxServe's Algorithm 3 (Duan et al., ICML 2024, section 3.4).
- `round_robin`: the same turns; meant for a pool without quotas (`pool_division.OpenPool`).
- `fcfs`: one line for all models; nobody overtakes one who waits for the chip.
"""

from __future__ import annotations

from collections.abc import Iterator

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.scheduling.fair_share import Phase, StepKey
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Prefill, Step


class ConcurrentAdaptiveBatch:
    """`adbs`: prefills first, models in turn; then decodes, models in turn.

    While a prefill could run but for the chip, which decodes fill, no decode is started, so that
    the chip drains for it. A prefill that was refused pages holds nobody back until a request has
    ended.
    """

    name = "adbs"
    one_prefill = True

    def __init__(self, compute: ComputeShares) -> None:
        self._compute = compute
        self._last: dict[Phase, str] = {}
        self._refused: dict[str, int] = {}

    def next_step(self, unit: Scheduler, now: float) -> Step | None:
        running = unit.in_flight()
        step: Step | None
        if not (self.one_prefill and any(phase == "prefill" for _, phase in running)):
            held_back = False
            for model in self.prefills(unit, now):
                if not self._compute.fits((model, "prefill"), running):
                    held_back |= self._might_fit(unit, model)
                    continue
                step = unit.make_prefill(model)
                if step is not None:
                    self.made(unit, step, now)
                    return step
                self._refused[model] = _finished(unit)
            if held_back and self.one_prefill:
                return None
        for model in self.decodes(unit, now):
            if self._compute.fits((model, "decode"), running):
                step = unit.make_decode(model)
                if step is not None:
                    self.made(unit, step, now)
                    return step
        return None

    def prefills(self, unit: Scheduler, now: float) -> list[str]:
        """Models whose prefill is to be started now, in order: all that have one, in turn."""
        del now
        return [m for m in self._turns(unit, "prefill") if unit.models[m].has_prefill]

    def decodes(self, unit: Scheduler, now: float) -> list[str]:
        """Models with sequences to decode, in order: in turn."""
        del now
        return [m for m in self._turns(unit, "decode") if unit.models[m].has_decode]

    def made(self, unit: Scheduler, step: Step, now: float) -> None:
        """Notes which step was made."""
        del unit, now
        self._last["prefill" if isinstance(step, Prefill) else "decode"] = step.model

    def _turns(self, unit: Scheduler, phase: Phase) -> list[str]:
        """Models in turn, who went last at the end."""
        models = list(unit.models)
        last = self._last.get(phase)
        first = 0 if last is None else models.index(last) + 1
        return models[first:] + models[:first]

    def _might_fit(self, unit: Scheduler, model: str) -> bool:
        """Whether there may be pages and a slot for a prefill."""
        if not unit.models[model].free_slots:
            return bool(unit.models[model].prefilling)
        return self._refused.get(model) != _finished(unit)


class ConcurrentRoundRobin(ConcurrentAdaptiveBatch):
    """`round_robin`: the turns of `adbs`. What sets them apart is how the pool is divided."""

    name = "round_robin"


class ConcurrentStatic(ConcurrentAdaptiveBatch):
    """`static`: each model on its own part of the chip, with nothing to wait for of others'.

    Within a part one program runs at a time, prefills first.
    """

    name = "static"
    one_prefill = False

    def prefills(self, unit: Scheduler, now: float) -> list[str]:
        """Models with prompts whose part of the chip is free."""
        return self._free(unit, super().prefills(unit, now))

    def decodes(self, unit: Scheduler, now: float) -> list[str]:
        """Models with sequences whose part of the chip is free."""
        return self._free(unit, super().decodes(unit, now))

    @staticmethod
    def _free(unit: Scheduler, models: list[str]) -> list[str]:
        busy = {model for model, _ in unit.in_flight()}
        return [model for model in models if model not in busy]


class ConcurrentFcfs:
    """`fcfs`: the request that came first over all models is prefilled first, and the model whose
    oldest request came first decodes first; others run beside it only if they need not be waited
    for.
    """

    name = "fcfs"

    def __init__(self, compute: ComputeShares) -> None:
        self._compute = compute

    def next_step(self, unit: Scheduler, now: float) -> Step | None:
        del now
        running = unit.in_flight()
        step: Step | None
        if not any(phase == "prefill" for _, phase in running):
            line = [
                (next(iter(group.values())).order, name)
                for name, state in unit.models.items()
                for group in (state.prefilling, state.waiting)
                if group
            ]
            if line:
                first: StepKey = (min(line)[1], "prefill")
                if self._compute.fits(first, running):
                    step = unit.make_prefill(first[0])
                    if step is not None:
                        return step
                elif unit.models[first[0]].free_slots:
                    return None
        for _, model in sorted(_oldest_settled(unit)):
            if (model, "decode") in running:
                continue
            if not self._compute.fits((model, "decode"), running):
                return None
            step = unit.make_decode(model)
            if step is not None:
                return step
        return None


def _oldest_settled(unit: Scheduler) -> Iterator[tuple[int, str]]:
    """For each model the place in line of its oldest sequence that no step in flight works on."""
    for name, state in unit.models.items():
        for request in state.running.values():
            if unit.settled(request):
                yield request.order, name
                break


def _finished(unit: Scheduler) -> int:
    return sum([state.finished for state in unit.models.values()])
