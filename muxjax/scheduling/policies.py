"""What picks the next step.

- `adbs`: MuxServe's adaptive batch scheduling (Duan et al., ICML 2024, section 3.4, Algorithm 3),
  for one program at a time.
- `fcfs`: requests of all models in one line, as in a server that swaps models in time.
- `round_robin`: models in turn, one step each.
"""

from __future__ import annotations

from muxjax.scheduling.steps import Step
from muxjax.scheduling.time_quotas import Turn
from muxjax.scheduling.unit import Policy, Unit

BURST_SECONDS = 0.1
"""How long a decode burst may take: long enough that the host's work between two steps, about a
millisecond, does not count; short enough that a new prompt soon gets its turn."""
MIN_BURST_SECONDS = 0.02
PREFILL_OVERDRAFT = 2.0
"""Seconds that the prefills of all models may together be ahead of their shares and go first.
A decode step costs nearly the same for one sequence as for many, so that starting to decode before
a wave of prompts is in costs more than it gives: 8 prompts of 128 tokens (1.6 s) on two cores made
66 tokens/s with 0.5 s, and 95 with 2 s."""


class AdaptiveBatch:
    """`adbs`: prefill first, then decodes, each within its share of device time.

    Algorithm 3 launches one prefill at a time, models in turn, and fills the rest of the chip with
    decodes, models in turn, as far as their shares of the chip go. Here programs run one after the
    other and shares are of time (`TimeQuotas`):

    1. Prefills go first, the model furthest behind its share before the others, until prefills are
       ahead of their shares by their part of `PREFILL_OVERDRAFT`.
    2. Then whoever is furthest behind its share goes, prefill or decode.
    3. A decode burst is as long as `BURST_SECONDS` allows, shorter for a model whose share is
       smaller than that of others that decode.

    Whoever cannot go, for want of pages or because all its tokens are in flight, is passed over.
    Algorithm 3 starts no decodes while a prefill is held back for want of the chip; here a prefill
    is held back only for want of pages or slots, which decodes free.
    """

    name = "adbs"

    def next_step(self, unit: Unit, now: float) -> Step | None:
        del now
        time = unit.time
        prefills: list[Turn] = []
        decodes: list[Turn] = []
        for model, state in unit.models.items():
            if state.has_prefill:
                prefills.append((model, "prefill"))
            if state.has_decode:
                decodes.append((model, "decode"))
        turns = prefills + decodes
        time.begin(turns)
        if not turns:
            return None
        turns.sort(key=time.virtual)
        if prefills and decodes:
            total = sum([time.shares[turn] for turn in prefills])
            first = {
                turn
                for turn in prefills
                if time.credit(turn) >= -PREFILL_OVERDRAFT * time.shares[turn] / total
            }
            turns.sort(key=lambda turn: turn not in first)
        for turn in turns:
            model, phase = turn
            step: Step | None
            if phase == "prefill":
                step = unit.make_prefill(model)
            else:
                step = unit.make_decode(model, self._burst(unit, turn, decodes))
            if step is not None:
                return step
        return None

    @staticmethod
    def _burst(unit: Unit, turn: Turn, decodes: list[Turn]) -> int:
        """Tokens of a decode burst of this model."""
        shares = unit.time.shares
        mean = sum([shares[other] for other in decodes]) / len(decodes)
        seconds = BURST_SECONDS * min(1.0, shares[turn] / mean)
        size = len(unit.models[turn[0]].running)
        return int(max(MIN_BURST_SECONDS, seconds) / unit.estimates.decode(turn[0], size))


class Fcfs:
    """`fcfs`: one line for all models.

    Prefixes in order of arrival over all models go first; if the first in line cannot go, nobody
    overtakes it. Otherwise the model decodes whose oldest running request came first.
    """

    name = "fcfs"

    def next_step(self, unit: Unit, now: float) -> Step | None:
        del now
        states = unit.models.items()
        # Started prefixes hold pages, so they end before new ones begin.
        started = [
            (next(iter(state.prefilling.values())).order, model)
            for model, state in states
            if state.prefilling
        ]
        waiting = [
            (next(iter(state.waiting.values())).order, model)
            for model, state in states
            if state.waiting
        ]
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


class RoundRobin:
    """`round_robin`: models in turn; a turn is a prefill if one can be made, otherwise a decode."""

    name = "round_robin"

    def __init__(self) -> None:
        self._next = 0

    def next_step(self, unit: Unit, now: float) -> Step | None:
        del now
        models = list(unit.models)
        for offset in range(len(models)):
            index = (self._next + offset) % len(models)
            state = unit.models[models[index]]
            step: Step | None = None
            if state.has_prefill:
                step = unit.make_prefill(models[index])
            if step is None and state.has_decode:
                step = unit.make_decode(models[index])
            if step is not None:
                self._next = index + 1
                return step
        return None


POLICIES: dict[str, type[Policy]] = {"adbs": AdaptiveBatch, "fcfs": Fcfs, "round_robin": RoundRobin}


def make_policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
      ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name]()
