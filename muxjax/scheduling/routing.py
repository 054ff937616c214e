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
        """How long a request of so many tokens, output included, is expected to take."""


R = TypeVar("R", bound=Replica)


def least_loaded[R: Replica](
    units: Iterable[R], waits: Mapping[str, float], model: str, num_tokens: int
) -> R:
    """The unit with the least of what requests are expected to take, over all that are outstanding
    there and this one: of two that idle the quicker, of two that are alike the one with less to do.

    Requests are weighed by how long they take beside others and not by the time that they have a
    device to themselves, which says nothing where many decode together. By that a point less was in
    time in eight cells of `benchmarks/policy_map.py` (A100s, alpha 0.7 and 0.9, load 0.75 and 1,
    scale 2 and 4), where some of the 19 models are on two meshes.

    Args:
      units: that have the model; one at least. Of equals the first.
      waits: the sum over all that are outstanding, by unit.
      model: of the request.
      num_tokens: of the request, output included.
    """
    return min(units, key=lambda unit: waits[unit.name] + unit.seconds(model, num_tokens))
