"""How long steps take: guesses at first, then what was measured.

Steps are filed by model, phase and the power of two that their size falls in, as compiled buckets
are. Each file holds an exponentially weighted mean, so that estimates follow a machine that
changes.
"""

from __future__ import annotations

from collections.abc import Iterable

EWMA_WEIGHT = 0.2
"""Weight of a new measurement against all before it."""
_BUCKETS = 40
"""More than there are: sizes are below 2**39."""
LEAST_SECONDS = 1e-9
"""What a token takes at least, whatever a coarse clock says: policies divide by it."""


class StepEstimates:
    """Estimated durations of the steps of a unit's models.

    Args:
      models: names.
      prefill_seconds: guess for one prefill token, until a step was measured.
      decode_seconds: guess for one token of a decode step, until a step was measured.
    """

    def __init__(
        self,
        models: Iterable[str],
        *,
        prefill_seconds: float = 5e-4,
        decode_seconds: float = 2e-2,
    ) -> None:
        names = list(models)
        self._prefill_guess = prefill_seconds
        self._decode_guess = decode_seconds
        # Prefill: seconds a token; decode: seconds a step of one token. By the bucket's exponent.
        self._prefill = {name: _Means() for name in names}
        self._decode = {name: _Means() for name in names}

    def add_model(self, model: str) -> None:
        """Takes in a model; what was measured of it before is kept."""
        self._prefill.setdefault(model, _Means())
        self._decode.setdefault(model, _Means())

    def prefill(self, model: str, num_tokens: int) -> float:
        """Seconds that a prefill step of this many tokens takes."""
        means = self._prefill[model]
        near = means.near.get((num_tokens - 1).bit_length())
        value = self._prefill_guess if near is None else means.values[near]
        return num_tokens * value

    def decode(self, model: str, num_seqs: int, num_tokens: int = 1) -> float:
        """Seconds that a decode step takes that makes so many tokens for so many sequences."""
        means = self._decode[model]  # asked dozens of times a step: a call less counts
        near = means.near.get((num_seqs - 1).bit_length())
        value = self._decode_guess if near is None else means.values[near]
        return num_tokens * value

    def observe_prefill(self, model: str, num_tokens: int, seconds: float) -> None:
        """Takes in a measured prefill step."""
        self._prefill[model].update(num_tokens, seconds / num_tokens)

    def observe_decode(self, model: str, num_seqs: int, num_tokens: int, seconds: float) -> None:
        """Takes in a measured decode step that ran for `num_tokens` tokens."""
        self._decode[model].update(num_seqs, seconds / num_tokens)


class _Means:
    """Of one model and phase: the mean of each bucket that was measured, by its exponent; and the
    measured bucket that is nearest to each, where there is any.
    """

    __slots__ = ("near", "values")

    def __init__(self) -> None:
        self.values: dict[int, float] = {}
        self.near: dict[int, int] = {}

    def update(self, size: int, value: float) -> None:
        """Takes in a measurement."""
        bucket = (size - 1).bit_length()
        value = max(LEAST_SECONDS, value)
        old = self.values.get(bucket)
        self.values[bucket] = value if old is None else old + EWMA_WEIGHT * (value - old)
        if old is None:
            for other in range(_BUCKETS):
                # Of two that are as far away, the smaller.
                self.near[other] = min(self.values, key=lambda one: (abs(one - other), one))
