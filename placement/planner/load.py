"""The planner's input for one model: its expected load, latency targets and limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from muxjax.errors import PlanError
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.specs import LatencySlo


@dataclass(frozen=True)
class ModelLoad:
    """Expected load, latency targets and limits of one model of the fleet.

    Attributes:
      name: unique in the fleet.
      kind: the model's name in the cost model.
      expected: rate and mean lengths of its requests.
      slo: latency targets; the planner uses only explicit `ttft` and `tpot`.
      kv_floor: guaranteed fraction of its unit's KV pool, 0 to 1; None: computed.
      max_batch: maximum number of concurrent sequences of a replica; None: limited by memory only.
      longest: tokens of the longest request; None: as long as the mean request. As in the engine,
        the KV pool must fit it together with one mean request of each other model.

    Raises:
      PlanError: an output length, floor, batch or length outside its range.
    """

    name: str
    kind: str
    expected: ExpectedLoad = field(default_factory=ExpectedLoad)
    slo: LatencySlo = field(default_factory=LatencySlo)
    kv_floor: float | None = None
    max_batch: int | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        output = self.expected.output_tokens
        if output < 1:
            raise PlanError(f"{self.name}: output_tokens must be at least 1, not {output}")
        if self.kv_floor is not None and not 0 <= self.kv_floor <= 1:
            raise PlanError(f"{self.name}: kv_floor must be from 0 to 1, not {self.kv_floor}")
        if self.max_batch is not None and self.max_batch < 1:
            raise PlanError(f"{self.name}: max_batch must be at least 1, not {self.max_batch}")
        if self.longest is not None and self.longest < 1:
            raise PlanError(f"{self.name}: longest must be at least 1 token, not {self.longest}")


def validate_loads(loads: Sequence[ModelLoad]) -> None:
    """Raises PlanError for a fleet without models or with duplicate model names."""
    if not loads:
        raise PlanError("the fleet has no models")
    names = [load.name for load in loads]
    for name in names:
        if names.count(name) > 1:
            raise PlanError(f"two models of the fleet are called {name}; names must be unique")
