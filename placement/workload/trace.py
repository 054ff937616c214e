"""Requests as a workload gives them: when, of which model, how long.

A workload is anything that yields `TraceRequest`s in order of arrival, anew each time it is
iterated; generators and readers make them one by one, so that a million of them never sit in
memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from muxjax.errors import WorkloadError


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload.

    Attributes:
      arrival: seconds since the workload's start.
      model: the model's name; empty if the trace does not say (see `workload.Assigned`).
      prompt_tokens: tokens of the prompt, at least 1.
      output_tokens: tokens of the output, at least 1.
      hash_ids: hashes of the prompt's blocks (Mooncake's traces): equal ones are equal prefixes.
    """

    arrival: float
    model: str
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@runtime_checkable
class Workload(Protocol):
    """Requests in order of arrival. May be iterated again, and yields the same again."""

    def __iter__(self) -> Iterator[TraceRequest]: ...


def checked(
    requests: Iterable[tuple[str, TraceRequest]],
) -> Iterator[TraceRequest]:
    """Passes on what makes sense, in order.

    Args:
      requests: each with where it stands, for messages (`trace.jsonl:17`).

    Raises:
      WorkloadError: an arrival before the one above it, negative or not finite; no tokens.
    """
    last = 0.0
    for where, request in requests:
        arrival = request.arrival
        if not (math.isfinite(arrival) and arrival >= 0):
            raise WorkloadError(f"{where}: the arrival must be 0 s or later, not {arrival}")
        if arrival < last:
            raise WorkloadError(
                f"{where}: out of order: this arrival ({arrival:.6g} s) comes before the one above "
                f"it ({last:.6g} s); sort the trace by time"
            )
        for what, tokens in (
            ("prompt", request.prompt_tokens),
            ("output", request.output_tokens),
        ):
            if tokens < 1:
                raise WorkloadError(f"{where}: the {what} must have a token at least, not {tokens}")
        last = arrival
        yield request


@dataclass(frozen=True)
class Faster:
    """A workload at another rate: the same requests with `factor` times less time between them."""

    workload: Workload
    factor: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise WorkloadError(f"a rate scale must be above 0, not {self.factor}")

    def __iter__(self) -> Iterator[TraceRequest]:
        for request in self.workload:
            yield replace(request, arrival=request.arrival / self.factor)


@dataclass(frozen=True)
class First:
    """The first requests of a workload, at most `count` of them and of the first `seconds`."""

    workload: Workload
    count: int | None = None
    seconds: float | None = None

    def __iter__(self) -> Iterator[TraceRequest]:
        for index, request in enumerate(self.workload):
            if self.count is not None and index >= self.count:
                return
            if self.seconds is not None and request.arrival > self.seconds:
                return
            yield request
