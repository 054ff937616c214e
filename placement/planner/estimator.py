"""What a unit delivers: throughput, batches and latencies of models that share a mesh.

Two execution models (`Execution`):

`concurrent` is MuxServe's (Duan et al., ICML 2024, section 3.2, equation 3). Prefills of a unit run
in turn, decodes at the same time, each with its share of the compute: with `b` sequences a model
serves `x = b / (P + o t(b))` requests a second, where `P` is the time that all models' prefills of
their batches take and `o t(b)` that of its `o` output tokens. The batches are the fixed point. When
the shares of the decodes add up to more than the whole, all are slowed in proportion.

`time_sliced` is MuxJAX's: one program at a time. With `b` sequences decoding together a request
takes `h(b) = p(b) + o t(b) / b` seconds of the mesh, its prefill and its part of each decode step.
All models decode equally often, so `b` is in proportion to `rate x o`, and the more the memory
holds, the less time a request takes. The unit serves the fraction `1 / sum(rate h)` of the load.

In both,
- a model may have a degree of tensor parallelism of its own; the rest of the mesh holds further
  copies of it, among which its load is divided;
- sequences hold prompt and output in full, and a model has room for one at least: the floor;
- what the unit cannot serve is refused as the scheduler's quotas have it. Concurrent: each model
  has KV for what it needs, up to a quota in proportion to its rate and bytes, and more where others
  leave some. Time sliced: every model is served the same fraction of its rate.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from muxjax.placement.costs.cost_model import CostModel
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import Execution

POOL_SHARE = 0.9
"""Part of the memory beside the weights that the pool takes, as the engine has it."""
PAGED = 0.97
"""Of it, what a request of full length finds in pages: the rest is the dummy block and the ends of
slabs."""
PREFILL_TOKENS = 2048
"""Most tokens of a prefill step, as the engine has it on accelerators."""
LARGEST_BATCH = 1024
_BATCHES = tuple(float(2**k) for k in range(LARGEST_BATCH.bit_length()))
_ROUNDS = 30
_CLOSE = 1e-4


@dataclass(frozen=True, slots=True)
class BatchCurve:
    """Times of one copy of a model on `tp` devices, against its batch.

    Attributes:
      tp: devices of a copy.
      replicas: on the mesh.
      rate: requests a second of one copy.
      output_tokens: of a request.
      sequence_bytes: KV of one request, on each device.
      longest_bytes: that of the longest one.
      weight_bytes: on each device.
      prefill: seconds of a prefill of the whole batch, at each of `_BATCHES`.
      decode: seconds of all decode steps of a request, at each of them.
      busy: mesh seconds that the batch takes where time is sliced: `b h(b)`.
    """

    tp: int
    replicas: int
    rate: float
    output_tokens: float
    sequence_bytes: float
    longest_bytes: float
    weight_bytes: float
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    busy: tuple[float, ...]


def build_batch_curve(load: ModelLoad, costs: CostModel, *, size: int, tp: int) -> BatchCurve:
    """The curve of a model on a mesh of `size` devices, with all of their compute.

    A batch beyond the most that may run at once takes so many times as long as that.
    """
    kind, prompt = load.kind, load.prompt_tokens
    decode = _decode_times(load, costs, tp, 1.0)
    prefill, busy = [], []
    most = max(1.0, PREFILL_TOKENS / max(prompt, 1.0))
    full = costs.prefill_seconds(kind, most * prompt, prompt, tp=tp) / most
    for batch, decoding in zip(_BATCHES, decode, strict=True):
        seconds = costs.prefill_seconds(kind, batch * prompt, prompt, tp=tp)
        prefill.append(seconds)
        busy.append((seconds if batch <= most else batch * full) + decoding)
    replicas = size // tp
    return BatchCurve(
        tp=tp,
        replicas=replicas,
        rate=load.rate / replicas,
        output_tokens=load.output_tokens,
        sequence_bytes=load.tokens * costs.kv_bytes_per_token(kind, tp=tp),
        longest_bytes=(load.longest or 0) * costs.kv_bytes_per_token(kind, tp=tp),
        weight_bytes=costs.weight_bytes(kind, tp=tp),
        prefill=tuple(prefill),
        decode=decode,
        busy=tuple(busy),
    )


def with_share(curve: BatchCurve, load: ModelLoad, costs: CostModel, share: float) -> BatchCurve:
    """The same where decoding has a share of the compute: for concurrent execution."""
    return replace(curve, decode=_decode_times(load, costs, curve.tp, share))


def _decode_times(load: ModelLoad, costs: CostModel, tp: int, share: float) -> tuple[float, ...]:
    """Seconds of all decode steps of a request at each of `_BATCHES`."""
    most = float(load.max_batch or LARGEST_BATCH)
    seconds, output, context = costs.decode_seconds, load.output_tokens, load.context
    return tuple(
        [
            output
            * seconds(load.kind, min(batch, most), context, tp=tp, share=share)
            * max(1.0, batch / most)
            for batch in _BATCHES
        ]
    )


def _at(values: Sequence[float], batch: float) -> float:
    """Linear between the batches; below one the value at one, above the last in proportion."""
    if batch <= 1.0:
        return values[0]
    if batch >= LARGEST_BATCH:
        return values[-1] * batch / LARGEST_BATCH
    k = bisect_left(_BATCHES, batch)
    low = _BATCHES[k - 1]
    return values[k - 1] + (values[k] - values[k - 1]) * (batch - low) / low


def _in_proportion(values: Sequence[float], batch: float) -> float:
    """The same, but in proportion below one: a batch that is there part of the time."""
    return batch * values[0] if batch < 1.0 else _at(values, batch)


def prefill_seconds(curve: BatchCurve, batch: float) -> float:
    """Seconds of prefill of one request, when the whole batch is prefilled at once."""
    return _in_proportion(curve.prefill, batch) / batch if batch > 0 else curve.prefill[0]


def busy_seconds(curve: BatchCurve, batch: float) -> float:
    """Mesh seconds of one request where time is sliced, `h(b)`."""
    return _at(curve.busy, batch) / max(1.0, batch)


def decode_seconds(curve: BatchCurve, batch: float) -> float:
    """Of these, those of its decode steps."""
    return _at(curve.decode, batch) / max(1.0, batch)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Where a unit settles.

    Attributes:
      fractions: of its rate that each model is served.
      batches: sequences of each model's copy that decode together.
      use: of the resource that limits the unit, 1 where something is refused.
      seconds: concurrent: of the prefills of all batches; time sliced: between two decode steps of
        a model.
    """

    fractions: tuple[float, ...]
    batches: tuple[float, ...]
    use: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Mean seconds to the first token, and for each further one."""

    ttft: float
    tpot: float


def pool_bytes(curves: Sequence[BatchCurve], memory: float) -> float:
    """The KV pool on each device beside the weights; negative where they do not fit."""
    return POOL_SHARE * (memory - sum([curve.weight_bytes for curve in curves]))


def settle(
    curves: Sequence[BatchCurve], memory: float, execution: Execution, slow: float = 1.0
) -> OperatingPoint | None:
    """Where a unit settles, or None where weights and one request of each model do not fit, or not
    the longest of one model beside a mean one of each other.

    Args:
      curves: its models.
      memory: bytes of a device.
      execution: how they share the mesh.
      slow: concurrent: by how much decodes are slowed, the sum of the shares if that is above 1.
    """
    pool = pool_bytes(curves, memory)
    mean = sum([curve.sequence_bytes for curve in curves])
    longest = max([curve.longest_bytes - curve.sequence_bytes for curve in curves])
    if pool < mean or (longest > 0 and PAGED * pool < mean + longest):
        return None
    if execution == "time_sliced":
        return _time_sliced(curves, pool)
    return _concurrent(curves, pool, slow)


# Time sliced


def _time_sliced(curves: Sequence[BatchCurve], pool: float) -> OperatingPoint:
    weights = [curve.rate * curve.output_tokens for curve in curves]
    most = _longest_gap(curves, weights, pool)
    need, seconds = _need(curves, weights, most), most
    if need > 1.0:
        # Steps of large batches may cost more than in proportion; then a smaller one serves more.
        for part in (0.7, 0.5, 0.35, 0.25, 0.12):
            less = _need(curves, weights, part * most)
            if less < need:
                need, seconds = less, part * most
    fraction = min(1.0, 1.0 / need) if need > 0 else 1.0
    batches = tuple([weight * seconds for weight in weights])
    return OperatingPoint((fraction,) * len(curves), batches, min(1.0, need), seconds)


def _need(curves: Sequence[BatchCurve], weights: Sequence[float], seconds: float) -> float:
    """Mesh seconds a second for the whole load, `sum(rate h)`, at a time between decode steps."""
    total = 0.0
    for curve, weight in zip(curves, weights, strict=True):
        batch = weight * seconds
        if batch <= 1.0:
            total += curve.rate * curve.busy[0]
        elif batch >= LARGEST_BATCH:
            total += curve.rate * curve.busy[-1] / LARGEST_BATCH
        else:
            total += curve.rate * _at(curve.busy, batch) / batch
    return total


def _longest_gap(curves: Sequence[BatchCurve], weights: Sequence[float], pool: float) -> float:
    """The time between decode steps at which the batches fill the pool; each is one at least."""
    pairs = [(weight, curve.sequence_bytes) for weight, curve in zip(weights, curves, strict=True)]
    growing = [pair for pair in pairs if pair[0] > 0]
    room = pool - sum([size for weight, size in pairs if weight <= 0])
    while growing:
        seconds = room / sum([weight * size for weight, size in growing])
        small = [pair for pair in growing if pair[0] * seconds < 1.0]
        if not small:
            return seconds
        room -= sum([size for _, size in small])
        growing = [pair for pair in growing if pair[0] * seconds >= 1.0]
    return 1.0 / max([weight for weight, _ in pairs]) if any(weights) else 0.0


# Concurrent


def _concurrent(curves: Sequence[BatchCurve], pool: float, slow: float) -> OperatingPoint:
    prefill = before = 0.0
    for _ in range(_ROUNDS):
        batches = [_least_batch(curve, slow, prefill) for curve in curves]
        held = sum([c.sequence_bytes * max(1.0, b) for c, b in zip(curves, batches, strict=True)])
        if held > pool:
            batches = _within_quotas(curves, batches, pool)
        total = sum([_in_proportion(c.prefill, b) for c, b in zip(curves, batches, strict=True)])
        change = total - prefill
        if abs(change) <= _CLOSE * total:
            break
        # It goes up by steps of a nearly constant ratio: jump to where they end.
        ratio = change / before if before else 0.0
        if 0 < ratio < 0.95:
            prefill, before = total + change * ratio / (1 - ratio), 0.0
        else:
            prefill, before = total, change
    fractions = []
    for curve, batch in zip(curves, batches, strict=True):
        served = 1.0
        if curve.rate > 0:
            served = batch / (curve.rate * (prefill + slow * _at(curve.decode, batch)))
        fractions.append(served if served < 1 - 10 * _CLOSE else 1.0)
    use = 1.0 if min(fractions) < 1.0 else min(1.0, held / pool)
    return OperatingPoint(tuple(fractions), tuple(batches), use, prefill)


def _least_batch(curve: BatchCurve, slow: float, prefill: float) -> float:
    """The least batch that serves the rate; where none does, the one that serves most."""
    rate, decode = curve.rate, curve.decode
    first = rate * (prefill + slow * decode[0])
    if first <= 1.0:
        return first
    best, most, before = 1.0, 0.0, decode[0]
    for batch, seconds in zip(_BATCHES, decode, strict=True):
        cycle = prefill + slow * seconds
        if rate * cycle <= batch:
            low = batch / 2
            slope = slow * (seconds - before) / low
            return rate * (prefill + slow * before - slope * low) / (1 - rate * slope)
        served = batch / cycle
        if served > most:
            best, most = batch, served
        before = seconds
    return best


def _within_quotas(
    curves: Sequence[BatchCurve], wanted: Sequence[float], pool: float
) -> list[float]:
    """Batches that fill the pool: what each model wants, or its quota if that is less.

    Quotas are in proportion to rates times bytes of a request, and what a model does not want of
    its own goes to the others; one request is the least.
    """
    batches = [min(1.0, batch) for batch in wanted]
    open_ = [index for index, batch in enumerate(wanted) if batch > 1.0]
    room = pool - sum([curve.sequence_bytes for curve in curves])
    room += sum([curves[index].sequence_bytes for index in open_])
    while open_:
        scale = room / sum([curves[i].sequence_bytes * curves[i].rate for i in open_])
        low = [i for i in open_ if scale * curves[i].rate < 1.0]
        done = low or [i for i in open_ if wanted[i] <= scale * curves[i].rate]
        for i in done or open_:
            batches[i] = 1.0 if low else min(wanted[i], scale * curves[i].rate)
            room -= curves[i].sequence_bytes * batches[i]
        open_ = [i for i in open_ if i not in done] if done else []
    return batches


# Latency


def latencies(
    curves: Sequence[BatchCurve], point: OperatingPoint, execution: Execution, slow: float = 1.0
) -> list[Latency | None]:
    """Mean latencies of each model; None where more comes than is served: its queue grows.

    A prompt waits for the step that runs and for the prompts before it, as in a queue whose server
    prefers prefills (Cobham, 1954); decode steps are in its way where time is sliced only.
    """
    singles = [curve.prefill[0] for curve in curves]
    prefill_use = sum([c.rate * s for c, s in zip(curves, singles, strict=True)])
    residual = sum([c.rate * s * s for c, s in zip(curves, singles, strict=True)]) / 2
    steps = [
        slow * _at(c.decode, b) / c.output_tokens
        for c, b in zip(curves, point.batches, strict=True)
    ]
    found: list[Latency | None] = []
    if execution == "time_sliced":
        shares = [
            c.rate * c.output_tokens * step / max(1.0, b)
            for c, step, b in zip(curves, steps, point.batches, strict=True)
        ]
        residual += sum([share * step for share, step in zip(shares, steps, strict=True)]) / 2
        total = prefill_use + sum(shares)
    for index, (curve, single) in enumerate(zip(curves, singles, strict=True)):
        if point.fractions[index] < 1.0 or prefill_use >= 1.0:
            found.append(None)
            continue
        ttft = residual / (1 - prefill_use) + single
        if execution == "time_sliced":
            others = min(0.99, max(0.0, total - shares[index]))
            tpot = max(point.seconds, steps[index] / (1 - others))
        else:
            tpot = steps[index] + point.seconds / curve.output_tokens
        found.append(Latency(ttft, tpot))
    return found


def quiet_point(curves: Sequence[BatchCurve], point: OperatingPoint) -> OperatingPoint:
    """Where time is sliced, the least time between decode steps that serves the whole load.

    `settle` looks at full batches, which serve most. At a load that leaves time, steps come as soon
    as they can, with smaller batches.
    """
    if min(point.fractions) < 1.0:
        return point
    weights = [curve.rate * curve.output_tokens for curve in curves]
    low, high = 0.0, point.seconds
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if _need(curves, weights, middle) > 1.0:
            low = middle
        else:
            high = middle
    batches = tuple([weight * high for weight in weights])
    return OperatingPoint(point.fractions, batches, point.use, high)
