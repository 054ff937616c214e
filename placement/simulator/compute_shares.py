"""Shares of the chip, where programs of several models run side by side.

MuxServe gives each model's prefill and decode a share of the streaming multiprocessors and starts
a program when its share is free (Duan et al., ICML 2024, sections 3.3 and 3.4). XLA programs that
pass one array on cannot do that; the simulator can, to say what it would bring.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from muxjax.scheduling.fair_share import StepKey

OVERLAP = 0.2
"""How much of the chip may be promised twice (MuxServe's `overload_threshold` of 2 tenths)."""


class ComputeShares:
    """The part of the chip, above 0 and up to 1, that each model's prefill and decode takes.

    Args:
      shares: of every model and phase.
      overlap: how far the shares of running programs may exceed the chip.

    Raises:
      ValueError: a share that is not above 0 and at most 1.
    """

    def __init__(self, shares: Mapping[StepKey, float], overlap: float = OVERLAP) -> None:
        for (model, phase), share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(
                    f"{model}: the {phase} share must be above 0 and at most 1, not {share}"
                )
        self._shares = dict(shares)
        self._taken: dict[StepKey, float] = {}
        self._most = 1.0 + overlap + 1e-9

    def __getitem__(self, turn: StepKey) -> float:
        return self._shares[turn]

    def taken(self, turn: StepKey) -> float:
        """What the program takes that was started last: its own share, unless more was lent."""
        return self._taken.get(turn, self._shares[turn])

    def lend(
        self, turn: StepKey, running: Collection[StepKey], working: Collection[StepKey]
    ) -> None:
        """Deals what the idle leave among those that have work, in proportion to their own shares.

        To be called for each program that is started. What is lent is not called back before the
        program ends: the owner starts beside it, and all are slower for so long.

        Args:
          turn: which program is started.
          running: those that run already; nothing of theirs is lent.
          working: those for which there is work, this one and the running among them.
        """
        own = self._shares[turn]
        part = own / sum([self._shares[other] for other in working])
        free = 1.0 - sum([self.taken(other) for other in running])
        self._taken[turn] = max(own, min(part, free))

    def fits(self, turn: StepKey, running: Collection[StepKey]) -> bool:
        """Whether the program can start beside those that run; each runs once at a time."""
        if turn in running:
            return False
        return self._shares[turn] + sum([self._shares[other] for other in running]) <= self._most
