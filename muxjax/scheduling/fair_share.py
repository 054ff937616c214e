"""Shares of device time, where one program at a time owns the chip.

MuxServe gives prefill and decode of each model a share of the streaming multiprocessors; programs
of XLA run in turn, so here each (model, phase) has a share of the time. Shares follow the expected
need, with a part that is the same for all so that nobody's is tiny. Use is measured, and what
counts is virtual time, use divided by share (fair queueing: Demers, Keshav and Shenker, SIGCOMM
1989). Credit and debt, in seconds, are the distance from the mean of all that have work, as the
deficit of deficit round-robin is.

- Whoever is furthest behind is next, so nobody starves, and over time each gets its share.
- Who has no work earns nothing: its time goes to the others, and it comes back without credit.
- Who used more than its share stays in debt until the others have caught up, or all are idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

Phase = Literal["prefill", "decode"]
type StepKey = tuple[str, Phase]
"""A model's name and the phase: what has a share."""

EVEN_PART = 0.2
"""The part of the time that is shared evenly, whatever the expected needs."""
MAX_CREDIT = 4.0
"""Seconds that one who is held back, for want of pages say, may be behind its share. More than
prefills may be ahead (`policies.PREFILL_OVERDRAFT`): what decodes are owed is not to be forgotten.
"""


class FairShare:
    """Shares, use and credit of every (model, phase) of a unit.

    Attributes:
      shares: of the time, for each; 1 together.
      used: seconds of device time.
      mean: the virtual time of all that have work.
    """

    def __init__(self, models: Iterable[str]) -> None:
        self.shares: dict[StepKey, float] = {}
        self.used: dict[StepKey, float] = {}
        self._virtual: dict[StepKey, float] = {}
        self.mean = 0.0
        self._active: frozenset[StepKey] = frozenset()
        # Of those that had work last: who, in the order given; their shares; the sum of share times
        # virtual time; and the mean below which none of them is too far behind.
        self._last: list[StepKey] = []
        self._weight = self._sum = self._fine_below = 0.0
        self.set_models(models)

    def set_models(self, models: Iterable[str]) -> None:
        """Says which models there are, with even shares until `set_needs`.

        Who is new has neither credit nor debt; what the others used and are owed stays.
        """
        phases: tuple[Phase, ...] = ("prefill", "decode")
        turns: list[StepKey] = [(model, phase) for model in models for phase in phases]
        self.shares = {turn: 1.0 / len(turns) for turn in turns}
        self._virtual = {turn: self._virtual.get(turn, self.mean) for turn in turns}
        self._active = self._active.intersection(turns)
        self._changed()
        for turn in turns:
            self.used.setdefault(turn, 0.0)

    def set_needs(self, needs: Mapping[StepKey, float]) -> None:
        """Sets the shares from expected needs, in seconds of device time per second."""
        if not self.shares:
            return
        total = sum(max(0.0, needs[turn]) for turn in self.shares)
        even = 1.0 / len(self.shares)
        for turn in self.shares:
            part = max(0.0, needs[turn]) / total if total > 0 else even
            self.shares[turn] = EVEN_PART * even + (1 - EVEN_PART) * part
        self._changed()

    def _changed(self) -> None:
        """Notes that the shares are others."""
        self._last = []
        self._phases = dict.fromkeys(("prefill", "decode"), 0.0)
        for (_, phase), share in self.shares.items():
            self._phases[phase] += share

    def begin(self, active: list[StepKey]) -> None:
        """Says who has work now. To be called before credits are compared.

        Mostly that is who had it before, and then the sums go on from there: it is asked before
        each step, and with many models this is the most of what a step costs.
        """
        if active and active == self._last:
            self.mean = self._sum / self._weight
            if self.mean < self._fine_below:
                return
        before, self._active = self._active, frozenset(active)
        self._last = list(active)
        virtual, shares = self._virtual, self.shares
        if not active:
            for turn, value in virtual.items():
                virtual[turn] = min(value, self.mean)
            return
        stayed = [turn for turn in active if turn in before]
        if stayed:
            weight = sum([shares[turn] for turn in stayed])
            self.mean = sum([shares[turn] * virtual[turn] for turn in stayed]) / weight
        for turn in active:
            floor = self.mean
            if turn in before:
                floor -= MAX_CREDIT / shares[turn]
            if virtual[turn] < floor:
                virtual[turn] = floor
        self._weight = sum([shares[turn] for turn in active])
        self._sum = sum([shares[turn] * virtual[turn] for turn in active])
        self._fine_below = min([virtual[turn] + MAX_CREDIT / shares[turn] for turn in active])

    def credit(self, turn: StepKey) -> float:
        """Seconds that it is behind (above 0) or ahead of (below 0) its share."""
        return self.shares[turn] * (self.mean - self._virtual[turn])

    def part(self, turn: StepKey) -> float:
        """Its share of the time of all that are in the same phase."""
        return self.shares[turn] / self._phases[turn[1]]

    @property
    def virtual(self) -> Callable[[StepKey], float]:
        """The virtual time of a turn: the least is next."""
        return self._virtual.__getitem__

    def charge(self, turn: StepKey, seconds: float) -> None:
        """Books device time; negative to correct an estimate."""
        self.used[turn] += seconds
        share = self.shares[turn]
        virtual = self._virtual[turn] = self._virtual[turn] + seconds / share
        if turn in self._active:
            self._sum += seconds
            self._fine_below = min(self._fine_below, virtual + MAX_CREDIT / share)
