"""Workloads: sequences of requests with arrival times, models and lengths.

A workload is an iterable of `TraceRequest`s in order of arrival and can be iterated repeatedly.
Generators and readers yield one request at a time, so memory does not grow with the workload.
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
      model: the model's name; empty if the trace has none (see `synthetic.AssignedWorkload`).
      prompt_tokens: tokens of the prompt, at least 1.
      output_tokens: tokens of the output, at least 1.
      hash_ids: hashes of the prompt's blocks (Mooncake traces): equal hashes mean equal prefixes.
    """

    arrival: float
    model: str
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@runtime_checkable
class Workload(Protocol):
    """Requests in order of arrival. Every iteration yields the same requests."""

    def __iter__(self) -> Iterator[TraceRequest]: ...


def validate_requests(
    requests: Iterable[tuple[str, TraceRequest]],
) -> Iterator[TraceRequest]:
    """Yields the requests after validating their order and lengths.

    Args:
      requests: pairs of a position in the file, for messages (`trace.jsonl:17`), and a request.

    Raises:
      WorkloadError: an arrival that is negative, not finite or earlier than the previous one, or a
        prompt or output without tokens.
    """
    last = 0.0
    for where, request in requests:
        arrival = request.arrival
        if not (math.isfinite(arrival) and arrival >= 0):
            raise WorkloadError(f"{where}: the arrival must be 0 s or later, not {arrival}")
        if arrival < last:
            raise WorkloadError(
                f"{where}: out of order: this arrival ({arrival:.6g} s) is before the previous one "
                f"({last:.6g} s); sort the trace by time"
            )
        for part, tokens in (
            ("prompt", request.prompt_tokens),
            ("output", request.output_tokens),
        ):
            if tokens < 1:
                raise WorkloadError(f"{where}: the {part} must have at least 1 token, not {tokens}")
        last = arrival
        yield request


@dataclass(frozen=True)
class ScaledWorkload:
    """A workload at `factor` times its rate: the same requests with gaps divided by `factor`.

    Raises:
      WorkloadError: a factor that is not above 0.
    """

    workload: Workload
    factor: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise WorkloadError(f"a rate scale must be above 0, not {self.factor}")

    def __iter__(self) -> Iterator[TraceRequest]:
        for request in self.workload:
            yield replace(request, arrival=request.arrival / self.factor)


@dataclass(frozen=True)
class TruncatedWorkload:
    """The first requests of a workload: at most `count`, up to `seconds`. None: no limit."""

    workload: Workload
    count: int | None = None
    seconds: float | None = None

    def __iter__(self) -> Iterator[TraceRequest]:
        return truncate(self.workload, self.count, self.seconds)


def truncate(
    requests: Iterable[TraceRequest], count: int | None, seconds: float | None
) -> Iterator[TraceRequest]:
    """Yields the first requests: at most `count`, up to `seconds`. None: no limit."""
    for index, request in enumerate(requests):
        if count is not None and index >= count:
            return
        if seconds is not None and request.arrival > seconds:
            return
        yield request
