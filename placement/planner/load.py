"""What is expected of the models: rates, lengths, latency targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from muxjax.errors import PlanError


@dataclass(frozen=True)
class Slo:
    """Latency targets of a model; None: no target.

    Attributes:
      ttft: seconds to the first token, on average.
      tpot: seconds for each token after it, on average.
    """

    ttft: float | None = None
    tpot: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise PlanError(f"slo.{name} must be above 0 seconds, not {value}")


@dataclass(frozen=True)
class ModelLoad:
    """One model of the fleet and its expected load.

    Attributes:
      name: unique in the fleet.
      kind: what the cost model calls it.
      rate: requests a second.
      prompt_tokens, output_tokens: mean lengths.
      slo: latency targets.
      kv_floor: the part of its unit's pool that is always its own; None: computed.
      max_batch: most sequences of a copy that run at once; None: as many as its memory holds.
      longest: tokens of the longest request, which its pool must hold beside one mean request of
        each other model, as the engine asks; None: no more than the mean one.

    Raises:
      PlanError: a rate or length that is negative, NaN or infinite, or an output of no token.
    """

    name: str
    kind: str
    rate: float
    prompt_tokens: float = 161.0
    output_tokens: float = 338.0
    slo: Slo = Slo()
    kv_floor: float | None = None
    max_batch: int | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        for field, what in (
            ("rate", "requests a second"),
            ("prompt_tokens", "tokens"),
            ("output_tokens", "tokens"),
        ):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise PlanError(
                    f"{self.name}: {field} must be a finite number of {what}, "
                    f"0 or more, not {value}"
                )
        if self.output_tokens < 1:
            raise PlanError(
                f"{self.name}: output_tokens must be at least 1, not {self.output_tokens}"
            )
        if self.kv_floor is not None and not 0 <= self.kv_floor <= 1:
            raise PlanError(f"{self.name}: kv_floor must be from 0 to 1, not {self.kv_floor}")
        if self.max_batch is not None and self.max_batch < 1:
            raise PlanError(f"{self.name}: max_batch must be at least 1, not {self.max_batch}")
        if self.longest is not None and self.longest < 1:
            raise PlanError(f"{self.name}: longest must be at least 1 token, not {self.longest}")

    @property
    def tokens(self) -> float:
        """Tokens of a request, prompt and output."""
        return self.prompt_tokens + self.output_tokens

    @property
    def context(self) -> float:
        """Tokens that a sequence holds while it decodes, on average."""
        return self.prompt_tokens + self.output_tokens / 2


def check_loads(loads: Sequence[ModelLoad]) -> None:
    """Raises PlanError for a fleet without models, or with two of one name."""
    if not loads:
        raise PlanError("the fleet has no models")
    names = [load.name for load in loads]
    for name in names:
        if names.count(name) > 1:
            raise PlanError(f"two models of the fleet are called {name}")
