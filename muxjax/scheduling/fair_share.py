"""Shares of device time for programs that run one at a time (weighted fair queueing).

MuxServe gives prefill and decode of each model a share of the streaming multiprocessors. XLA
programs run one after the other, so here each (model, phase) has a share of the time instead.
Shares follow the expected demand, with a part that is equal for all, so that no share is tiny.

Device time is charged as virtual time: seconds divided by the share (Demers, Keshav and Shenker,
SIGCOMM 1989). The credit of a key is its distance, in seconds, from the mean virtual time of all
keys that have work. It corresponds to the deficit of deficit round-robin.

- The key with the least virtual time is furthest behind its share and runs next. No key starves,
  and over time each key gets its share.
- A key without work earns no credit: its time goes to the others.
- A key that used more than its share stays in debt until the others have caught up, or until no key
  has work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

Phase = Literal["prefill", "decode"]
type StepKey = tuple[str, Phase]
"""Model name and phase, which together have a share of the time."""

EVEN_PART = 0.2
"""Part of the time (0 to 1) that is shared evenly, whatever the expected demand."""
MAX_CREDIT = 4.0
"""Maximum seconds that a key can be behind its share, for example while pages are short. Above
`PREFILL_OVERDRAFT` of the policies, so that time owed to decodes is not lost."""


class FairShare:
    """Shares, use and credit of every (model, phase) of a scheduler.

    Args:
      models: names of the models.

    Attributes:
      shares: share of the time of each key; they add up to 1.
      used: device time of each key, in seconds.
      mean_virtual_time: mean virtual time of the keys that have work, weighted by their shares.
    """

    def __init__(self, models: Iterable[str]) -> None:
        self.shares: dict[StepKey, float] = {}
        self.used: dict[StepKey, float] = {}
        self._virtual_time: dict[StepKey, float] = {}
        self.mean_virtual_time = 0.0
        self._active: frozenset[StepKey] = frozenset()
        # Of the active keys: their list, the sum of their shares, the sum of share times virtual
        # time, and the mean below which no key is further behind than `MAX_CREDIT`.
        self._active_list: list[StepKey] = []
        self._active_share = self._weighted_sum = self._credit_limit = 0.0
        self.set_models(models)

    def set_models(self, models: Iterable[str]) -> None:
        """Replaces the models, with even shares until `set_demand` is called.

        A new model has neither credit nor debt; the virtual time of the others stays.
        """
        phases: tuple[Phase, ...] = ("prefill", "decode")
        keys: list[StepKey] = [(model, phase) for model in models for phase in phases]
        self.shares = {key: 1.0 / len(keys) for key in keys}
        before = self._virtual_time
        self._virtual_time = {key: before.get(key, self.mean_virtual_time) for key in keys}
        self._active = self._active.intersection(keys)
        self._shares_changed()
        for key in keys:
            self.used.setdefault(key, 0.0)

    def set_demand(self, demand: Mapping[StepKey, float]) -> None:
        """Sets the shares from the expected demand, in seconds of device time per second."""
        if not self.shares:
            return
        total = sum(max(0.0, demand[key]) for key in self.shares)
        even = 1.0 / len(self.shares)
        for key in self.shares:
            part = max(0.0, demand[key]) / total if total > 0 else even
            self.shares[key] = EVEN_PART * even + (1 - EVEN_PART) * part
        self._shares_changed()

    def _shares_changed(self) -> None:
        self._active_list = []
        self._phase_totals = dict.fromkeys(("prefill", "decode"), 0.0)
        for (_, phase), share in self.shares.items():
            self._phase_totals[phase] += share

    def set_active(self, active: list[StepKey]) -> None:
        """Sets the keys that have work now. Call it before credits are compared.

        It runs before every step, where it dominates the host time with many models. The sums are
        therefore reused while the active keys stay the same.
        """
        if active and active == self._active_list:
            self.mean_virtual_time = self._weighted_sum / self._active_share
            if self.mean_virtual_time < self._credit_limit:
                return
        before, self._active = self._active, frozenset(active)
        self._active_list = list(active)
        virtual_time, shares = self._virtual_time, self.shares
        if not active:
            for key, value in virtual_time.items():
                virtual_time[key] = min(value, self.mean_virtual_time)
            return
        stayed = [key for key in active if key in before]
        if stayed:
            weight = sum([shares[key] for key in stayed])
            weighted = sum([shares[key] * virtual_time[key] for key in stayed])
            self.mean_virtual_time = weighted / weight
        for key in active:
            floor = self.mean_virtual_time
            if key in before:
                floor -= MAX_CREDIT / shares[key]
            if virtual_time[key] < floor:
                virtual_time[key] = floor
        self._active_share = sum([shares[key] for key in active])
        self._weighted_sum = sum([shares[key] * virtual_time[key] for key in active])
        self._credit_limit = min([virtual_time[key] + MAX_CREDIT / shares[key] for key in active])

    def credit(self, key: StepKey) -> float:
        """Seconds that a key is behind (above 0) or ahead of (below 0) its share."""
        return self.shares[key] * (self.mean_virtual_time - self._virtual_time[key])

    def phase_share(self, key: StepKey) -> float:
        """A key's share of the time of all keys of the same phase."""
        return self.shares[key] / self._phase_totals[key[1]]

    @property
    def virtual_time(self) -> Callable[[StepKey], float]:
        """Function from a key to its virtual time, in seconds; the key with the least is next.

        It is the dictionary's method, without a wrapper, since every decision sorts by it.
        """
        return self._virtual_time.__getitem__

    def charge(self, key: StepKey, seconds: float) -> None:
        """Charges device time to a key; negative to correct an estimate."""
        self.used[key] += seconds
        share = self.shares[key]
        value = self._virtual_time[key] = self._virtual_time[key] + seconds / share
        if key in self._active:
            self._weighted_sum += seconds
            self._credit_limit = min(self._credit_limit, value + MAX_CREDIT / share)
