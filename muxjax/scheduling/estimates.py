"""Estimated step durations: initial guesses, replaced by measurements.

Measurements are grouped like compiled buckets: by model, phase, and step size rounded up to a power
of two. Each group keeps an exponentially weighted mean, so that the estimates follow a machine
whose speed changes.
"""

from __future__ import annotations

from collections.abc import Iterable

from muxjax.scheduling.steps import Prefill, Step

EWMA_WEIGHT = 0.2
"""Weight (0 to 1) of a new measurement; see docs/measurements/slo-tuning.md."""
_BUCKETS = 40
"""Number of size groups; sizes are below 2**39."""
MIN_SECONDS = 1e-9
"""Minimum seconds per token: policies divide by it, and a coarse clock may report 0."""


class StepEstimates:
    """Estimated durations of the steps of a unit's models, in seconds.

    Args:
      models: names of the models.
      prefill_seconds: guess for one prefill token, until a step is measured.
      decode_seconds: guess for one token of a decode step, until a step is measured.
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
        # Prefill: seconds per token; decode: seconds per step of one token.
        self._prefill = {name: _BucketMeans() for name in names}
        self._decode = {name: _BucketMeans() for name in names}

    def add_model(self, model: str) -> None:
        """Adds a model; measurements from before its removal are kept."""
        self._prefill.setdefault(model, _BucketMeans())
        self._decode.setdefault(model, _BucketMeans())

    def prefill(self, model: str, num_tokens: int) -> float:
        """Seconds of a prefill step of this many tokens."""
        means = self._prefill[model]
        nearest = means.nearest.get((num_tokens - 1).bit_length())
        value = self._prefill_guess if nearest is None else means.values[nearest]
        return num_tokens * value

    def decode(self, model: str, num_seqs: int, num_tokens: int = 1) -> float:
        """Seconds of a decode step of `num_tokens` tokens for each of `num_seqs` sequences."""
        means = self._decode[model]  # inlined: called dozens of times a step
        nearest = means.nearest.get((num_seqs - 1).bit_length())
        value = self._decode_guess if nearest is None else means.values[nearest]
        return num_tokens * value

    def step_seconds(self, step: Step) -> float:
        """Seconds of a step."""
        if isinstance(step, Prefill):
            return self.prefill(step.model, step.num_tokens)
        return self.decode(step.model, len(step.sequences), step.num_tokens)

    def observe_prefill(self, model: str, num_tokens: int, seconds: float) -> None:
        """Adds a measured prefill step."""
        self._prefill[model].update(num_tokens, seconds / num_tokens)

    def observe_decode(self, model: str, num_seqs: int, num_tokens: int, seconds: float) -> None:
        """Adds a measured decode step that ran for `num_tokens` tokens."""
        self._decode[model].update(num_seqs, seconds / num_tokens)


class _BucketMeans:
    """Means of one model and phase.

    Attributes:
      values: mean of each measured bucket, by the bucket's exponent.
      nearest: exponent of the nearest measured bucket, for every exponent; empty without any.
    """

    __slots__ = ("nearest", "values")

    def __init__(self) -> None:
        self.values: dict[int, float] = {}
        self.nearest: dict[int, int] = {}

    def update(self, size: int, value: float) -> None:
        """Adds a measurement of a step of this size."""
        bucket = (size - 1).bit_length()
        value = max(MIN_SECONDS, value)
        mean = self.values.get(bucket)
        self.values[bucket] = value if mean is None else mean + EWMA_WEIGHT * (value - mean)
        if mean is None:
            for other in range(_BUCKETS):
                # Of two equally near buckets, the smaller.
                self.nearest[other] = min(self.values, key=lambda b: (abs(b - other), b))
