"""How long prompts and outputs are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from muxjax.errors import WorkloadError

SHAREGPT_PROMPT = 161.0
SHAREGPT_OUTPUT = 338.0
"""Mean tokens of ShareGPT's first turns (Kwon et al., SOSP 2023, figure 11)."""
PROMPT_SIGMA = 1.1
OUTPUT_SIGMA = 0.9
"""Spread of the logarithms. Chats are skewed: at these, half of the prompts are under 0.55 and half
of the outputs under 0.67 of their mean."""

_DRAWN = 256


@runtime_checkable
class Lengths(Protocol):
    """Draws pairs of prompt and output tokens, without end."""

    def draw(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]: ...


@dataclass(frozen=True)
class LogNormal:
    """Log-normal prompts and outputs, independent of each other.

    What lies beyond a limit is drawn again. The distribution is shifted so that the mean of what
    remains is the mean that was asked for.

    Attributes:
      prompt_tokens, output_tokens: means.
      prompt_sigma, output_sigma: standard deviations of the logarithms; 0 makes all alike.
      max_prompt, max_output: limits.

    Raises:
      WorkloadError: a mean under 1 or too near its limit, a negative sigma.
    """

    prompt_tokens: float = SHAREGPT_PROMPT
    output_tokens: float = SHAREGPT_OUTPUT
    prompt_sigma: float = PROMPT_SIGMA
    output_sigma: float = OUTPUT_SIGMA
    max_prompt: int = 1_000_000
    max_output: int = 1_000_000

    def __post_init__(self) -> None:
        # Fails now rather than when the first request is drawn.
        self._locations()

    def draw(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
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
    """Prompts and outputs from half to one and a half of their means, as MuxServe's fairness runs.

    Attributes:
      prompt_tokens, output_tokens: means.
    """

    prompt_tokens: float
    output_tokens: float

    def draw(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        means = np.array([self.prompt_tokens, self.output_tokens])
        while True:
            drawn = rng.uniform(means / 2, means * 1.5, (_DRAWN, 2))
            yield from np.maximum(1, drawn.round()).astype(int).tolist()


@dataclass(frozen=True)
class Sampled:
    """Pairs from a data set, drawn with replacement."""

    pairs: Sequence[tuple[int, int]]

    def draw(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        while True:
            for index in rng.integers(len(self.pairs), size=_DRAWN).tolist():
                yield self.pairs[index]


def _draw(rng: np.random.Generator, location: float, sigma: float, most: int) -> Iterator[int]:
    while True:
        drawn = rng.lognormal(location, sigma, _DRAWN)
        kept = drawn[drawn < most + 0.5]
        yield from np.maximum(1, kept.round()).astype(int).tolist()


def _location(what: str, mean: float, sigma: float, most: int) -> float:
    """The mean of the logarithms for which values up to `most` have this mean."""
    if not (math.isfinite(sigma) and sigma >= 0):
        raise WorkloadError(f"the spread of {what} lengths must not be negative, not {sigma}")
    if not (math.isfinite(mean) and mean >= 1):
        raise WorkloadError(f"the mean {what} must have a token at least, not {mean}")
    if mean > 0.8 * most:
        # The mean of a truncated distribution cannot come near its limit.
        raise WorkloadError(
            f"a mean {what} of {mean:g} tokens is too near the limit of {most}; raise the limit "
            f"(`max_model_len`) or lower the mean"
        )
    if sigma == 0:
        return math.log(mean)
    low = math.log(mean) - sigma**2 / 2
    high = low + 50.0
    if _truncated_mean(low, sigma, most) >= mean - 1e-9:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        if _truncated_mean(middle, sigma, most) < mean:
            low = middle
        else:
            high = middle
    return low


def _truncated_mean(location: float, sigma: float, most: int) -> float:
    edge = (math.log(most + 0.5) - location) / sigma
    inside = _normal(edge)
    if inside <= 0:
        return float(most)
    return math.exp(location + sigma**2 / 2) * _normal(edge - sigma) / inside


def _normal(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))
