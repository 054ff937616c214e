"""Compute shares of concurrent programs of several models.

MuxServe assigns each model's prefill and decode a share of the streaming multiprocessors. A program
starts when its share is free (Duan et al., ICML 2024, sections 3.3 and 3.4). In the engine all
steps update one KV pool array, so XLA runs them one after the other. The simulator predicts the
benefit of concurrent execution.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from muxjax.scheduling.fair_share import StepKey

OVERLAP = 0.2
"""Part of the chip that may be allocated twice (MuxServe's `overload_threshold`, 2 tenths)."""


class ComputeShares:
    """Fraction of the chip of each model's prefill and decode, above 0 and at most 1.

    Args:
      shares: share of every model and phase.
      overlap: how far the sum of the shares of running programs may exceed 1.

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
        """Share of the key's last started program, including lent shares."""
        return self._allocated.get(key, self._shares[key])

    def lend(self, key: StepKey, running: Collection[StepKey], active: Collection[StepKey]) -> None:
        """Lends a starting program its part of the idle shares, in proportion to its share.

        Call it for each program that starts. A lent share is not reclaimed before the program ends.
        If its owner starts earlier, all programs are slower until then.

        Args:
          key: the program that starts.
          running: the running programs; their shares are not lent.
          active: the keys with work, including `key` and `running`.
        """
        share = self._shares[key]
        part = share / sum([self._shares[other] for other in active])
        free = 1.0 - sum([self.allocated(other) for other in running])
        self._allocated[key] = max(share, min(part, free))

    def fits(self, key: StepKey, running: Collection[StepKey]) -> bool:
        """Whether a program can start while others run; each key runs once at a time."""
        if key in running:
            return False
        return self._shares[key] + sum([self._shares[other] for other in running]) <= self._limit
