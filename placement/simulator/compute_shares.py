"""Shares of the chip for programs of several models that run concurrently.

MuxServe gives each model's prefill and decode a share of the streaming multiprocessors and starts a
program when its share is free (Duan et al., ICML 2024, sections 3.3 and 3.4). XLA programs that
pass on one array cannot do that; the simulator can, to predict the benefit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from muxjax.scheduling.fair_share import StepKey

OVERLAP = 0.2
"""Part of the chip that may be allocated twice (MuxServe's `overload_threshold` of 2 tenths)."""


class ComputeShares:
    """The part of the chip, above 0 and up to 1, of each model's prefill and decode.

    Args:
      shares: share of every model and phase.
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
        self._allocated: dict[StepKey, float] = {}
        self._limit = 1.0 + overlap + 1e-9

    def __getitem__(self, key: StepKey) -> float:
        return self._shares[key]

    def allocated(self, key: StepKey) -> float:
        """Share of the program that was started last: its own share, unless more was lent."""
        return self._allocated.get(key, self._shares[key])

    def lend(self, key: StepKey, running: Collection[StepKey], active: Collection[StepKey]) -> None:
        """Divides idle shares among the keys that have work, in proportion to their own shares.

        Call it for each program that is started. A lent share is not reclaimed before the program
        ends: its owner starts beside it, and all programs are slower until then.

        Args:
          key: the program that is started.
          running: the programs that run already; their shares are not lent.
          active: the keys that have work, `key` and `running` included.
        """
        own = self._shares[key]
        part = own / sum([self._shares[other] for other in active])
        free = 1.0 - sum([self.allocated(other) for other in running])
        self._allocated[key] = max(own, min(part, free))

    def fits(self, key: StepKey, running: Collection[StepKey]) -> bool:
        """Whether a program can start beside those that run; each key runs once at a time."""
        if key in running:
            return False
        return self._shares[key] + sum([self._shares[other] for other in running]) <= self._limit
