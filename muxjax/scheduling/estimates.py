"""How long steps take: guesses at first, then what was measured.

Steps are filed by model, phase and the power of two that their size falls in, as compiled buckets
are. Each file holds an exponentially weighted mean, so that estimates follow a machine that
changes.
"""

from __future__ import annotations

from collections.abc import Iterable

EWMA_WEIGHT = 0.2
"""Weight of a new measurement against all before it."""
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
        self._prefill: dict[str, dict[int, float]] = {name: {} for name in names}
        self._decode: dict[str, dict[int, float]] = {name: {} for name in names}

    def add_model(self, model: str) -> None:
        """Takes in a model; what was measured of it before is kept."""
        self._prefill.setdefault(model, {})
        self._decode.setdefault(model, {})

    def prefill(self, model: str, num_tokens: int) -> float:
        """Seconds that a prefill step of this many tokens takes."""
        return num_tokens * _nearest(self._prefill[model], num_tokens, self._prefill_guess)

    def decode(self, model: str, num_seqs: int, num_tokens: int = 1) -> float:
        """Seconds that a decode step takes that makes so many tokens for so many sequences."""
        return num_tokens * _nearest(self._decode[model], num_seqs, self._decode_guess)

    def observe_prefill(self, model: str, num_tokens: int, seconds: float) -> None:
        """Takes in a measured prefill step."""
        _update(self._prefill[model], num_tokens, seconds / num_tokens)

    def observe_decode(self, model: str, num_seqs: int, num_tokens: int, seconds: float) -> None:
        """Takes in a measured decode step that ran for `num_tokens` tokens."""
        _update(self._decode[model], num_seqs, seconds / num_tokens)


def _nearest(measured: dict[int, float], size: int, guess: float) -> float:
    bucket = (size - 1).bit_length()
    value = measured.get(bucket)
    if value is not None:
        return value
    if not measured:
        return guess
    away = 0
    while value is None:  # ends, as there is one
        away += 1
        value = measured.get(bucket - away)
        if value is None:
            value = measured.get(bucket + away)
    return value


def _update(measured: dict[int, float], size: int, value: float) -> None:
    bucket = (size - 1).bit_length()
    value = max(LEAST_SECONDS, value)
    old = measured.get(bucket)
    measured[bucket] = value if old is None else old + EWMA_WEIGHT * (value - old)
