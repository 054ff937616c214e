"""Which of the units that have a model gets a request: the rule of engine and simulator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Replica(Protocol):
    """A unit, as far as routing goes."""

    @property
    def name(self) -> str:
        """Unique in the fleet."""

    def seconds(self, model: str, num_tokens: int) -> float:
        """Device time that a request of so many tokens, output included, is expected to take."""


R = TypeVar("R", bound=Replica)


def soonest(units: Iterable[R], waits: Mapping[str, float], model: str, num_tokens: int) -> R:
    """The unit where a request is expected to end first: the one with the least device time that is
    outstanding, its own included, so that of two that idle the quicker is taken.

    Args:
      units: that have the model; one at least. Of equals the first.
      waits: device time outstanding on each, by name.
      model: of the request.
      num_tokens: of the request, output included.
    """
    return min(units, key=lambda unit: waits[unit.name] + unit.seconds(model, num_tokens))
