"""Distributions of prompt and output lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from muxjax.errors import WorkloadError
from muxjax.scheduling.expected_load import MEAN_OUTPUT_TOKENS, MEAN_PROMPT_TOKENS

PROMPT_SIGMA = 1.1
OUTPUT_SIGMA = 0.9
"""Standard deviations of the logarithms, for the skewed lengths of chats: the median is 0.55 of the
mean for prompts and 0.67 for outputs."""

_PAIRS_PER_DRAW = 256


@runtime_checkable
class Lengths(Protocol):
    """A distribution of pairs of prompt and output tokens."""

    def draw(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Draws infinitely many pairs."""


@dataclass(frozen=True)
class LogNormal:
    """Independent log-normal prompts and outputs, truncated at a limit.

    Values above a limit are drawn again. The location of the distribution is chosen to give the
    truncated distribution the requested mean.

    Attributes:
      prompt_tokens, output_tokens: means in tokens.
      prompt_sigma, output_sigma: standard deviations of the logarithms; 0 makes all lengths equal.
      max_prompt, max_output: limits in tokens.

    Raises:
      WorkloadError: a mean below 1 or too close to its limit, or a negative sigma.
    """

    prompt_tokens: float = MEAN_PROMPT_TOKENS
    output_tokens: float = MEAN_OUTPUT_TOKENS
    prompt_sigma: float = PROMPT_SIGMA
    output_sigma: float = OUTPUT_SIGMA
    max_prompt: int = 1_000_000
    max_output: int = 1_000_000

    def __post_init__(self) -> None:
        # Validates here instead of at the first draw.
        self._locations()

    def draw(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        """See `Lengths`."""
        prompt, output = self._locations()
        prompts = _draw(rng, prompt, self.prompt_sigma, self.max_prompt)
        outputs = _draw(rng, output, self.output_sigma, self.max_output)
        return zip(prompts, outputs, strict=True)

    def _locations(self) -> tuple[float, float]:
        return (
            _location("prompt", self.prompt_tokens, self.prompt_sigma, self.max_prompt),
            _location("output", self.output_tokens, self.output_sigma, self.max_output),
        )


@dataclass(frozen=True)
class Uniform:
    """Uniform lengths from 0.5 to 1.5 times their means, as in MuxServe's fairness experiment.

    Attributes:
      prompt_tokens, output_tokens: means in tokens.
    """

    prompt_tokens: float
    output_tokens: float

    def draw(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        """See `Lengths`."""
        means = np.array([self.prompt_tokens, self.output_tokens])
        while True:
            drawn = rng.uniform(means / 2, means * 1.5, (_PAIRS_PER_DRAW, 2))
            yield from np.maximum(1, drawn.round()).astype(int).tolist()


@dataclass(frozen=True)
class Sampled:
    """Pairs of prompt and output tokens from a data set, drawn with replacement."""

    pairs: Sequence[tuple[int, int]]

    def draw(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        """See `Lengths`."""
        while True:
            for index in rng.integers(len(self.pairs), size=_PAIRS_PER_DRAW).tolist():
                yield self.pairs[index]


def _draw(rng: np.random.Generator, location: float, sigma: float, limit: int) -> Iterator[int]:
    while True:
        drawn = rng.lognormal(location, sigma, _PAIRS_PER_DRAW)
        accepted = drawn[drawn < limit + 0.5]
        yield from np.maximum(1, accepted.round()).astype(int).tolist()


def _location(part: str, mean: float, sigma: float, limit: int) -> float:
    """The mean of the logarithms for which the distribution truncated at `limit` has this mean."""
    if not (math.isfinite(sigma) and sigma >= 0):
        raise WorkloadError(f"the sigma of {part} lengths must be 0 or more, not {sigma}")
    if not (math.isfinite(mean) and mean >= 1):
        raise WorkloadError(f"the mean {part} must have at least 1 token, not {mean}")
    if mean > 0.8 * limit:
        # The mean of a truncated distribution cannot be close to its limit.
        raise WorkloadError(
            f"a mean {part} of {mean:g} tokens is too close to the limit of {limit}; raise the "
            f"limit (`max_model_len`) or lower the mean"
        )
    if sigma == 0:
        return math.log(mean)
    low = math.log(mean) - sigma**2 / 2
    high = low + 50.0
    if _truncated_mean(low, sigma, limit) >= mean - 1e-9:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        if _truncated_mean(middle, sigma, limit) < mean:
            low = middle
        else:
            high = middle
    return low


def _truncated_mean(location: float, sigma: float, limit: int) -> float:
    edge = (math.log(limit + 0.5) - location) / sigma
    accepted = _normal_cdf(edge)
    if accepted <= 0:
        return float(limit)
    return math.exp(location + sigma**2 / 2) * _normal_cdf(edge - sigma) / accepted


def _normal_cdf(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))
