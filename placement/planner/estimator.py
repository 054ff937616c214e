"""Steady-state estimate of a unit: throughput and batch sizes of models that share a mesh.

Two execution modes (`Execution`):

`concurrent` is MuxServe's (Duan et al., ICML 2024, section 3.2, equation 3). Prefills of a unit run
one after the other, decode steps run concurrently, each with its share of the compute. With `b`
sequences a model serves `x = b / (P + o t(b))` requests per second. `P` is the time of the prefills
of all models' batches and `o t(b)` the time of its `o` output tokens. The batches are the fixed
point of these equations. If the compute shares of the decode steps add up to more than 1, all are
slowed in proportion.

`time_sliced` is MuxJAX's: one program at a time. With `b` sequences decoding together, a request
takes `h(b) = p(b) + o t(b) / b` seconds of the mesh: its prefill and its part of each decode step.
All models decode equally often, so `b` is proportional to `rate x o`. More memory permits larger
batches, which take less time per request. The unit serves the fraction `1 / sum(rate h)` of the
load.

In both modes:
- If the `tp` of a model is smaller than the mesh, the mesh has several replicas, which share the
  load of the model.
- A sequence occupies KV for its full prompt and output. Each model has KV for at least one request.
- Load beyond the capacity is refused, as by the scheduler's KV quotas. Concurrent: a model gets the
  KV that it needs, up to a quota proportional to its rate and bytes, plus unused quota of other
  models. Time-sliced: every model is served the same fraction of its rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxjax.placement.planner.batch_curve import (
    BATCHES,
    LARGEST_BATCH,
    BatchCurve,
    interpolate,
    interpolate_from_zero,
    pool_bytes,
)
from muxjax.placement.planner.plan import Execution

PAGED = 0.97
"""Fraction of the pool that requests can use. The remainder is the dummy block and the free blocks
of partly used slabs."""
_ROUNDS = 30
"""Maximum iterations of the fixed point."""
_TOLERANCE = 1e-4
"""Relative change at which the fixed point has converged."""
_SMALLER_BATCHES = (0.7, 0.5, 0.35, 0.25, 0.12)
"""Fractions of the longest decode cycle that are also tried if load is refused."""


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """The steady state of a unit.

    Attributes:
      served: served fraction of each model's rate.
      batches: sequences per replica that decode together, for each model.
      utilization: utilization of the resource that limits the unit; 1 if load is refused.
      seconds: concurrent: total time of the prefills of all batches. Time-sliced: time between two
        decode steps of a model.
    """

    served: tuple[float, ...]
    batches: tuple[float, ...]
    utilization: float
    seconds: float


def find_operating_point(
    curves: Sequence[BatchCurve], memory: float, execution: Execution, slowdown: float = 1.0
) -> OperatingPoint | None:
    """Computes the steady state of a unit.

    Args:
      curves: one curve for each model of the unit.
      memory: bytes of a device.
      execution: how the models share the mesh.
      slowdown: factor on the time of decode steps (concurrent execution only): the sum of the
        compute shares if it is above 1.

    Returns:
      The steady state, or None if the models do not fit. The memory must fit the weights and one
      mean request of each model, or the longest request in place of one of these.
    """
    pool = pool_bytes(curves, memory)
    mean = sum([curve.sequence_bytes for curve in curves])
    longest = max([curve.longest_bytes - curve.sequence_bytes for curve in curves])
    if pool < mean or (longest > 0 and PAGED * pool < mean + longest):
        return None
    if execution == "time_sliced":
        return _time_sliced(curves, pool)
    return _concurrent(curves, pool, slowdown)


# Time-sliced execution


def _time_sliced(curves: Sequence[BatchCurve], pool: float) -> OperatingPoint:
    weights = decode_weights(curves)
    longest = _longest_cycle(curves, weights, pool)
    demand, seconds = mesh_demand(curves, weights, longest), longest
    if demand > 1.0:
        # If time grows faster than the batch, smaller batches serve more.
        for fraction in _SMALLER_BATCHES:
            smaller = mesh_demand(curves, weights, fraction * longest)
            if smaller < demand:
                demand, seconds = smaller, fraction * longest
    served = min(1.0, 1.0 / demand) if demand > 0 else 1.0
    batches = tuple([weight * seconds for weight in weights])
    return OperatingPoint((served,) * len(curves), batches, min(1.0, demand), seconds)


def decode_weights(curves: Sequence[BatchCurve]) -> list[float]:
    """Output tokens per second of a replica of each model; time-sliced batches are proportional."""
    return [curve.rate * curve.output_tokens for curve in curves]


def mesh_demand(curves: Sequence[BatchCurve], weights: Sequence[float], seconds: float) -> float:
    """Mesh seconds per second of the full load, `sum(rate h)`.

    Args:
      curves: the models of a time-sliced unit.
      weights: `decode_weights`.
      seconds: time between two decode steps of a model, which determines the batches.
    """
    total = 0.0
    for curve, weight in zip(curves, weights, strict=True):
        batch = weight * seconds
        if batch <= 1.0:
            total += curve.rate * curve.mesh_time[0]
        elif batch >= LARGEST_BATCH:
            total += curve.rate * curve.mesh_time[-1] / LARGEST_BATCH
        else:
            total += curve.rate * interpolate(curve.mesh_time, batch) / batch
    return total


def _longest_cycle(curves: Sequence[BatchCurve], weights: Sequence[float], pool: float) -> float:
    """The time between decode steps at which the batches, each at least 1, fill the pool."""
    pairs = [(weight, curve.sequence_bytes) for weight, curve in zip(weights, curves, strict=True)]
    growing = [pair for pair in pairs if pair[0] > 0]
    free = pool - sum([size for weight, size in pairs if weight <= 0])
    while growing:
        seconds = free / sum([weight * size for weight, size in growing])
        small = [pair for pair in growing if pair[0] * seconds < 1.0]
        if not small:
            return seconds
        free -= sum([size for _, size in small])
        growing = [pair for pair in growing if pair[0] * seconds >= 1.0]
    return 1.0 / max([weight for weight, _ in pairs]) if any(weights) else 0.0


# Concurrent execution


def _concurrent(curves: Sequence[BatchCurve], pool: float, slowdown: float) -> OperatingPoint:
    prefill = before = 0.0
    for _ in range(_ROUNDS):
        batches = [_smallest_batch(curve, slowdown, prefill) for curve in curves]
        held = sum([c.sequence_bytes * max(1.0, b) for c, b in zip(curves, batches, strict=True)])
        if held > pool:
            batches = _batches_within_quotas(curves, batches, pool)
        total = sum(
            [interpolate_from_zero(c.prefill, b) for c, b in zip(curves, batches, strict=True)]
        )
        change = total - prefill
        if abs(change) <= _TOLERANCE * total:
            break
        # The changes form a nearly geometric series: extrapolate to its limit.
        ratio = change / before if before else 0.0
        if 0 < ratio < 0.95:
            prefill, before = total + change * ratio / (1 - ratio), 0.0
        else:
            prefill, before = total, change
    served = []
    for curve, batch in zip(curves, batches, strict=True):
        fraction = 1.0
        if curve.rate > 0:
            cycle = prefill + slowdown * interpolate(curve.decode, batch)
            fraction = batch / (curve.rate * cycle)
        served.append(fraction if fraction < 1 - 10 * _TOLERANCE else 1.0)
    utilization = 1.0 if min(served) < 1.0 else min(1.0, held / pool)
    return OperatingPoint(tuple(served), tuple(batches), utilization, prefill)


def _smallest_batch(curve: BatchCurve, slowdown: float, prefill: float) -> float:
    """The smallest batch that serves the rate, else the batch with the highest throughput."""
    rate, decode = curve.rate, curve.decode
    first = rate * (prefill + slowdown * decode[0])
    if first <= 1.0:
        return first
    best, highest, before = 1.0, 0.0, decode[0]
    for batch, seconds in zip(BATCHES, decode, strict=True):
        cycle = prefill + slowdown * seconds
        if rate * cycle <= batch:
            low = batch / 2
            slope = slowdown * (seconds - before) / low
            return rate * (prefill + slowdown * before - slope * low) / (1 - rate * slope)
        served = batch / cycle
        if served > highest:
            best, highest = batch, served
        before = seconds
    return best


def _batches_within_quotas(
    curves: Sequence[BatchCurve], wanted: Sequence[float], pool: float
) -> list[float]:
    """Batches that fill the pool: each model's wanted batch, or its quota if that is smaller.

    Quotas are proportional to rate times bytes of a request, and at least one request. Unused quota
    is divided among the other models.
    """
    batches = [min(1.0, batch) for batch in wanted]
    undecided = [index for index, batch in enumerate(wanted) if batch > 1.0]
    free = pool - sum([curve.sequence_bytes for curve in curves])
    free += sum([curves[index].sequence_bytes for index in undecided])
    while undecided:
        scale = free / sum([curves[i].sequence_bytes * curves[i].rate for i in undecided])
        low = [i for i in undecided if scale * curves[i].rate < 1.0]
        done = low or [i for i in undecided if wanted[i] <= scale * curves[i].rate]
        for i in done or undecided:
            batches[i] = 1.0 if low else min(wanted[i], scale * curves[i].rate)
            free -= curves[i].sequence_bytes * batches[i]
        undecided = [i for i in undecided if i not in done] if done else []
    return batches
