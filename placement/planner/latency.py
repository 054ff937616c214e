"""Expected latencies of a unit in its steady state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxjax.placement.planner.batch_curve import BatchCurve, interpolate
from muxjax.placement.planner.estimator import OperatingPoint, decode_weights, mesh_demand
from muxjax.placement.planner.plan import Execution

_BISECTIONS = 30


@dataclass(frozen=True, slots=True)
class ExpectedLatency:
    """Mean latencies in seconds: time to first token, and per output token after it."""

    ttft: float
    tpot: float


def expected_latencies(
    curves: Sequence[BatchCurve],
    point: OperatingPoint,
    execution: Execution,
    slowdown: float = 1.0,
) -> list[ExpectedLatency | None]:
    """Mean latencies of each model; None for a model that is not served in full (its queue grows).

    A prompt waits for the remainder of the running step and for all earlier prompts: a queue with
    non-preemptive priority for prefills (Cobham, 1954). Decode steps delay prompts in time-sliced
    execution only.
    """
    singles = [curve.prefill[0] for curve in curves]
    prefill_use = sum([c.rate * s for c, s in zip(curves, singles, strict=True)])
    residual = sum([c.rate * s * s for c, s in zip(curves, singles, strict=True)]) / 2
    steps = [
        slowdown * interpolate(c.decode, b) / c.output_tokens
        for c, b in zip(curves, point.batches, strict=True)
    ]
    latencies: list[ExpectedLatency | None] = []
    if execution == "time_sliced":
        shares = [
            c.rate * c.output_tokens * step / max(1.0, b)
            for c, step, b in zip(curves, steps, point.batches, strict=True)
        ]
        residual += sum([share * step for share, step in zip(shares, steps, strict=True)]) / 2
        total = prefill_use + sum(shares)
    for index, (curve, single) in enumerate(zip(curves, singles, strict=True)):
        if point.served[index] < 1.0 or prefill_use >= 1.0:
            latencies.append(None)
            continue
        ttft = residual / (1 - prefill_use) + single
        if execution == "time_sliced":
            others = min(0.99, max(0.0, total - shares[index]))
            tpot = max(point.seconds, steps[index] / (1 - others))
        else:
            tpot = steps[index] + point.seconds / curve.output_tokens
        latencies.append(ExpectedLatency(ttft, tpot))
    return latencies


def min_latency_point(curves: Sequence[BatchCurve], point: OperatingPoint) -> OperatingPoint:
    """Finds the shortest time between decode steps that serves the full load (time-sliced).

    `find_operating_point` assumes full batches, which have the highest throughput. With slack,
    steps start earlier, with smaller batches.
    """
    if min(point.served) < 1.0:
        return point
    weights = decode_weights(curves)
    low, high = 0.0, point.seconds
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if mesh_demand(curves, weights, middle) > 1.0:
            low = middle
        else:
            high = middle
    batches = tuple([weight * high for weight in weights])
    return OperatingPoint(point.served, batches, point.utilization, high)
