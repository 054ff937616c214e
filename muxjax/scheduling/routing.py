"""Routing of a request among the units that have its model, in the engine and the simulator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Replica(Protocol):
    """A unit as the router sees it."""

    @property
    def name(self) -> str:
        """Unique in the fleet."""

    def seconds(self, model: str, num_tokens: int) -> float:
        """Expected duration of a request of this many tokens (prompt and output), in seconds."""


R = TypeVar("R", bound=Replica)


def least_loaded[R: Replica](
    units: Iterable[R], waits: Mapping[str, float], model: str, num_tokens: int
) -> R:
    """Returns the unit with the least expected seconds of outstanding requests and this request.

    Among idle units this is the fastest, among equal units the least loaded. Each request counts
    with its duration under load, since isolated device time says little about sequences that decode
    together; see docs/measurements/slo-tuning.md.

    Args:
      units: the units that have the model, at least one. The first of equals is chosen.
      waits: expected seconds of all outstanding requests, by unit.
      model: the request's model.
      num_tokens: tokens of the request's prompt and output.
    """
    return min(units, key=lambda unit: waits[unit.name] + unit.seconds(model, num_tokens))
