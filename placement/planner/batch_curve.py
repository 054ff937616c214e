"""Step times of one model on a mesh as a function of its batch size.

The curves are sampled at powers of two and interpolated linearly. Below a batch of 1 the time is
constant; above the largest sample it is proportional to the batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from muxjax.placement.costs.cost_model import CostModel
from muxjax.placement.planner.load import ModelLoad

POOL_SHARE = 0.9
"""Fraction of the memory without the weights that the KV pool uses, as in the engine."""
PREFILL_TOKENS = 2048
"""Maximum tokens of a prefill step, as in the engine on accelerators."""
LARGEST_BATCH = 1024
"""Largest sampled batch, in sequences."""
BATCHES = tuple(float(2**k) for k in range(LARGEST_BATCH.bit_length()))
"""Batch sizes at which curves are sampled."""


@dataclass(frozen=True, slots=True)
class BatchCurve:
    """Times and sizes of one replica of a model on `tp` devices, by batch size.

    Attributes:
      tp: devices of a replica.
      replicas: replicas on the mesh.
      rate: requests per second of one replica.
      output_tokens: mean tokens of an output.
      sequence_bytes: KV bytes of a mean request, on each device of the replica.
      longest_bytes: KV bytes of the longest request, on each device.
      weight_bytes: weight bytes on each device.
      prefill: seconds to prefill the whole batch, at each of `BATCHES`.
      decode: seconds of all decode steps of a request, at each of `BATCHES`.
      mesh_time: mesh seconds of the whole batch, from the first prefill to the last token
        (time-sliced execution), at each of `BATCHES`.
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
    mesh_time: tuple[float, ...]


def build_batch_curve(load: ModelLoad, costs: CostModel, *, size: int, tp: int) -> BatchCurve:
    """Builds the curve of a model on a mesh of `size` devices with all of their compute.

    A batch above the model's `max_batch` runs in rounds; its time is proportional to the batch.
    """
    kind, expected = load.kind, load.expected
    prompt = expected.prompt_tokens
    decode = _decode_times(load, costs, tp, 1.0)
    prefill, mesh_time = [], []
    prompts_per_step = max(1.0, PREFILL_TOKENS / max(prompt, 1.0))
    full_step = costs.prefill_seconds(kind, prompts_per_step * prompt, prompt, tp=tp)
    per_prompt = full_step / prompts_per_step
    for batch, decoding in zip(BATCHES, decode, strict=True):
        seconds = costs.prefill_seconds(kind, batch * prompt, prompt, tp=tp)
        prefill.append(seconds)
        prefilling = seconds if batch <= prompts_per_step else batch * per_prompt
        mesh_time.append(prefilling + decoding)
    replicas = size // tp
    token_bytes = costs.kv_bytes_per_token(kind, tp=tp)
    return BatchCurve(
        tp=tp,
        replicas=replicas,
        rate=expected.rate / replicas,
        output_tokens=expected.output_tokens,
        sequence_bytes=expected.request_tokens * token_bytes,
        longest_bytes=(load.longest or 0) * token_bytes,
        weight_bytes=costs.weight_bytes(kind, tp=tp),
        prefill=tuple(prefill),
        decode=decode,
        mesh_time=tuple(mesh_time),
    )


def with_compute_share(
    curve: BatchCurve, load: ModelLoad, costs: CostModel, share: float
) -> BatchCurve:
    """A copy with decode steps on a fraction `share` of the compute (concurrent execution)."""
    return replace(curve, decode=_decode_times(load, costs, curve.tp, share))


def _decode_times(load: ModelLoad, costs: CostModel, tp: int, share: float) -> tuple[float, ...]:
    """Seconds of all decode steps of a request at each of `BATCHES`."""
    limit = float(load.max_batch or LARGEST_BATCH)
    output, context = load.expected.output_tokens, load.expected.decode_context
    return tuple(
        [
            output
            * costs.decode_seconds(load.kind, min(batch, limit), context, tp=tp, share=share)
            * max(1.0, batch / limit)
            for batch in BATCHES
        ]
    )


def interpolate(values: Sequence[float], batch: float) -> float:
    """The value at any batch size, of a curve sampled at `BATCHES`."""
    if batch <= 1.0:
        return values[0]
    if batch >= LARGEST_BATCH:
        return values[-1] * batch / LARGEST_BATCH
    k = bisect_left(BATCHES, batch)
    low = BATCHES[k - 1]
    return values[k - 1] + (values[k] - values[k - 1]) * (batch - low) / low


def interpolate_from_zero(values: Sequence[float], batch: float) -> float:
    """As `interpolate`, but proportional below 1: a batch below 1 runs part of the time."""
    return batch * values[0] if batch < 1.0 else interpolate(values, batch)


def prefill_seconds(curve: BatchCurve, batch: float) -> float:
    """Seconds of prefill per request if the whole batch is prefilled at once."""
    return interpolate_from_zero(curve.prefill, batch) / batch if batch > 0 else curve.prefill[0]


def mesh_seconds(curve: BatchCurve, batch: float) -> float:
    """Mesh seconds per request in time-sliced execution, `h(b)`."""
    return interpolate(curve.mesh_time, batch) / max(1.0, batch)


def decode_seconds(curve: BatchCurve, batch: float) -> float:
    """Mesh seconds of decode steps per request, the decode part of `h(b)`."""
    return interpolate(curve.decode, batch) / max(1.0, batch)


def pool_bytes(curves: Sequence[BatchCurve], memory: float) -> float:
    """Bytes of the KV pool on a device of `memory` bytes; negative if the weights do not fit."""
    return POOL_SHARE * (memory - sum([curve.weight_bytes for curve in curves]))
