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
    """The unit with the least expected seconds of its outstanding requests and this one.

    Of two idle units that is the faster one, of two equal units the one with less load. Requests
    count with their duration beside others, not with their isolated device time, which says little
    where many decode together; see docs/measurements/slo-tuning.md.

    Args:
      units: the units that have the model, at least one; the first of equals is chosen.
      waits: expected seconds of all outstanding requests, by unit.
      model: the request's model.
      num_tokens: tokens of the request's prompt and output.
    """
    return min(units, key=lambda unit: waits[unit.name] + unit.seconds(model, num_tokens))
