"""Routing of a request among the units that have its model, in the engine and the simulator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable


@dataclass(frozen=True)
class PlannedLoad:
    """What a plan expects of a unit.

    Attributes:
      token_seconds: for each model, duration of a request in seconds per token, prompt and output;
        1 for a model without a value.
      outstanding: mean sum of the durations of all outstanding requests, in seconds. The default of
        1 means that no plan exists: every outstanding request then counts.
    """

    token_seconds: Mapping[str, float] = field(default_factory=dict)
    outstanding: float = 1.0

    def seconds(self, model: str, num_tokens: int) -> float:
        """Planned duration of a request of this many tokens (prompt and output), in seconds."""
        return self.token_seconds.get(model, 1.0) * num_tokens


@runtime_checkable
class Replica(Protocol):
    """A unit as the router sees it."""

    @property
    def name(self) -> str:
        """Unique in the fleet."""

    @property
    def planned_load(self) -> PlannedLoad:
        """What the plan expects of the unit."""


R = TypeVar("R", bound=Replica)


def fastest_unit[R: Replica](
    units: Iterable[R], outstanding: Mapping[str, float], model: str, num_tokens: int
) -> R:
    """Returns the unit with the shortest expected duration of a request.

    Up to the planned load of a unit that is the planned duration. Beyond, it grows with the load:
    sequences that decode together share the device. All models of the unit count.

    Args:
      units: the units that have the model, at least one. The first of equals is chosen.
      outstanding: sum of the planned durations of all outstanding requests in seconds, by unit.
      model: the request's model.
      num_tokens: tokens of the request's prompt and output.
    """

    def duration(unit: R) -> float:
        planned = unit.planned_load
        seconds = planned.seconds(model, num_tokens)
        load = (outstanding[unit.name] + seconds) / planned.outstanding
        return seconds * max(1.0, load)

    return min(units, key=duration)
