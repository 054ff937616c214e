"""Policies where prefills and decodes of several models run side by side, as MuxServe has them.

One prefill runs at a time; decodes of other models, and of the same model's other sequences, run
beside it as far as their shares of the chip go (`ComputeShares`). A sequence is in one step at a
time, so that the order in which steps end does not matter.

- `adbs`: MuxServe's Algorithm 3 (Duan et al., ICML 2024, section 3.4).
- `round_robin`: the same turns; meant for a pool without quotas (`quotas.OpenPool`).
- `fcfs`: one line for all models; nobody overtakes one who waits for the chip.
"""

from __future__ import annotations

from collections.abc import Iterator

from muxjax.scheduling.compute_shares import ComputeShares
from muxjax.scheduling.steps import Step
from muxjax.scheduling.time_quotas import Phase, Turn
from muxjax.scheduling.unit import Policy, Unit


class ConcurrentAdaptiveBatch:
    """`adbs`: prefills first, models in turn; then decodes, models in turn.

    While a prefill could run but for the chip, which decodes fill, no decode is started, so that
    the chip drains for it. A prefill that was refused pages holds nobody back until a request has
    ended.
    """

    name = "adbs"

    def __init__(self, compute: ComputeShares) -> None:
        self._compute = compute
        self._last: dict[Phase, int] = {"prefill": -1, "decode": -1}
        self._refused: dict[str, int] = {}

    def next_step(self, unit: Unit, now: float) -> Step | None:
        del now
        running = unit.in_flight()
        step: Step | None
        if not any(phase == "prefill" for _, phase in running):
            held_back = False
            for index, model in self._turns(unit, "prefill"):
                if not unit.models[model].has_prefill:
                    continue
                if not self._compute.fits((model, "prefill"), running):
                    held_back |= self._might_fit(unit, model)
                    continue
                step = unit.make_prefill(model)
                if step is not None:
                    self._last["prefill"] = index
                    return step
                self._refused[model] = _finished(unit)
            if held_back:
                return None
        for index, model in self._turns(unit, "decode"):
            if unit.models[model].has_decode and self._compute.fits((model, "decode"), running):
                step = unit.make_decode(model)
                if step is not None:
                    self._last["decode"] = index
                    return step
        return None

    def _turns(self, unit: Unit, phase: Phase) -> Iterator[tuple[int, str]]:
        """Models in turn, who went last at the end."""
        models = list(unit.models)
        for offset in range(1, len(models) + 1):
            index = (self._last[phase] + offset) % len(models)
            yield index, models[index]

    def _might_fit(self, unit: Unit, model: str) -> bool:
        """Whether there may be pages and a slot for a prefill."""
        if not unit.models[model].free_slots:
            return bool(unit.models[model].prefilling)
        return self._refused.get(model) != _finished(unit)


class ConcurrentRoundRobin(ConcurrentAdaptiveBatch):
    """`round_robin`: the turns of `adbs`. What sets them apart is how the pool is divided."""

    name = "round_robin"


class ConcurrentFcfs:
    """`fcfs`: the request that came first over all models is prefilled first, and the model whose
    oldest request came first decodes first; others run beside it only if they need not be waited
    for.
    """

    name = "fcfs"

    def __init__(self, compute: ComputeShares) -> None:
        self._compute = compute

    def next_step(self, unit: Unit, now: float) -> Step | None:
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
                first: Turn = (min(line)[1], "prefill")
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


def _oldest_settled(unit: Unit) -> Iterator[tuple[int, str]]:
    """For each model the place in line of its oldest sequence that no step in flight works on."""
    for name, state in unit.models.items():
        for request in state.running.values():
            if unit.settled(request):
                yield request.order, name
                break


def _finished(unit: Unit) -> int:
    return sum([state.finished for state in unit.models.values()])


CONCURRENT_POLICIES = {
    policy.name: policy
    for policy in (ConcurrentAdaptiveBatch, ConcurrentRoundRobin, ConcurrentFcfs)
}


def make_concurrent_policy(name: str, compute: ComputeShares) -> Policy:
    """The policy of this name for programs that run side by side.

    Raises:
      ValueError: there is none.
    """
    if name not in CONCURRENT_POLICIES:
        raise ValueError(
            f"no policy {name!r} for programs side by side; there are "
            f"{', '.join(CONCURRENT_POLICIES)}"
        )
    return CONCURRENT_POLICIES[name](compute)
