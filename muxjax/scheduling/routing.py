"""Routing of a request among the units that have its model, in the engine and the simulator."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

MEMORY_SECONDS = 30.0
"""Time constant with which the router forgets requests that it has assigned."""


@runtime_checkable
class Replica(Protocol):
    """A unit as the router sees it."""

    @property
    def name(self) -> str:
        """Unique in the fleet."""

    def request_interval(self, model: str) -> float:
        """Planned mean seconds between requests of a model; 1 without a plan."""


R = TypeVar("R", bound=Replica)


@dataclass(slots=True)
class _Load:
    """Tokens of a model on a unit: of outstanding requests, and recently assigned."""

    outstanding: float = 0.0
    assigned: float = 0.0
    updated_at: float = 0.0

    def recent(self, now: float) -> float:
        """The assigned tokens, of which a fraction is forgotten as time passes."""
        elapsed = max(0.0, now - self.updated_at)
        return self.assigned * math.exp(-elapsed / MEMORY_SECONDS)


class RequestRouting:
    """Chooses units so that each gets the planned part of a model's requests.

    A request goes to the unit with the fewest tokens of the model relative to its planned rate.
    Counted are the tokens of outstanding requests, and those assigned in the last
    `MEMORY_SECONDS`. Recent requests keep to the planned division of the load, which considers the
    other models of a unit. Outstanding requests are the mean latency (Little's law), so a unit that
    is slower than planned gets fewer.

    The tokens of a request are those of its prompt and output.
    """

    def __init__(self) -> None:
        self._loads: defaultdict[tuple[str, str], _Load] = defaultdict(_Load)

    def choose(self, units: Iterable[R], model: str, num_tokens: int, now: float) -> R:
        """Returns the unit for a request, without assigning it.

        Args:
          units: the units that have the model, at least one. The first of equals is chosen.
          model: the request's model.
          num_tokens: tokens of the request.
          now: time in seconds.
        """

        def weighted_tokens(unit: R) -> float:
            load = self._loads[unit.name, model]
            tokens = load.outstanding + load.recent(now) + num_tokens
            return tokens * unit.request_interval(model)

        return min(units, key=weighted_tokens)

    def add(self, unit: str, model: str, num_tokens: int, now: float) -> None:
        """Counts a request that is assigned to a unit."""
        load = self._loads[unit, model]
        load.assigned = load.recent(now) + num_tokens
        load.updated_at = now
        load.outstanding += num_tokens

    def remove(self, unit: str, model: str, num_tokens: int) -> None:
        """Counts a request that has ended or left the unit."""
        self._loads[unit, model].outstanding -= num_tokens

    def outstanding(self) -> dict[tuple[str, str], float]:
        """Tokens of the outstanding requests, by unit and model."""
        return {key: load.outstanding for key, load in self._loads.items()}
