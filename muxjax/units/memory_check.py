"""Refuses models that do not fit into memory before their weights are loaded or initialized.

The need is a lower bound: weights, pool, slots, and the activations of the largest step. The
compiler's memory is not counted, so that a fleet that fits is never refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import jax

from muxjax.config.memory_size import format_memory
from muxjax.errors import InsufficientMemory
from muxjax.executor.free_memory import FreeMemory, host_free_memory
from muxjax.executor.slot_state import SlotState
from muxjax.units.unit_spec import ModelBuildSpec, UnitSpec


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that models need on one device.

    Attributes:
      weights: by model name.
      pool: the KV cache.
      slots: state of the running sequences.
      steps: activations of the largest step.
    """

    weights: dict[str, int]
    pool: int
    slots: int
    steps: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self.weights.values()) + self.pool + self.slots + self.steps

    def __str__(self) -> str:
        parts = [("weights", sum(self.weights.values())), ("pool", self.pool)]
        parts += [("slots", self.slots), ("steps", self.steps)]
        return ", ".join(f"{format_memory(size)} for {name}" for name, size in parts if size)


def check_units_fit(units: Sequence[UnitSpec], *, include_sleeping: bool = False) -> None:
    """Checks that units fit into the free memory of their devices together.

    Args:
      units: not yet loaded.
      include_sleeping: count models that are `sleeping` too.

    Raises:
      InsufficientMemory: they do not fit.
    """
    needs: dict[jax.Device, list[MemoryNeed]] = {}
    for unit in units:
        specs = unit.model_specs if include_sleeping else unit.awake_specs
        need = _need(specs.values(), pool=unit.pool_bytes)
        for device in _local(unit.devices):
            needs.setdefault(device, []).append(need)
    _check({device: _sum(parts) for device, parts in needs.items()}, "the fleet")


def check_model_fits(spec: ModelBuildSpec, *, weights: bool = True) -> None:
    """Checks that a model fits beside those that are loaded.

    Args:
      spec: of the model.
      weights: count its weights; False for weights that already are in this memory.

    Raises:
      InsufficientMemory: it does not fit.
    """
    need = _need([spec], pool=0, weights=weights)
    devices = _local(spec.mesh.devices)
    _check(dict.fromkeys(devices, need), spec.model.name)


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turns a failed allocation into `InsufficientMemory`.

    Raises:
      InsufficientMemory: the body ran out of memory or could not start a thread.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        free = host_free_memory()
        left = "" if free is None else f"; {format_memory(free.num_bytes)} are free {free.place}"
        reason = str(error).splitlines()[0] if str(error) else "an allocation failed"
        raise InsufficientMemory(
            f"memory ran out while the fleet was loaded{left}: lower `pool.memory` or "
            f"`engine.max_seqs`, or serve fewer models ({reason[:160]})"
        ) from error


def insufficient_memory(subject: str, need: MemoryNeed, free: FreeMemory) -> InsufficientMemory:
    """Returns the error for models that do not fit.

    Args:
      subject: "the fleet", or the name of a model.
      need: of the models.
      free: memory that is left for them.
    """
    text = (
        f"{subject} does not fit: it needs {format_memory(need.total)} of memory ({need}), and "
        f"{format_memory(free.num_bytes)} are free {free.place}"
    )
    others = need.total - need.pool
    if need.pool and others < free.num_bytes:
        return InsufficientMemory(
            f"{text}; set `pool.memory` to at most {format_memory(free.num_bytes - others)} "
            "for each device"
        )
    factor = f"; {_round_up(need.total / free.num_bytes)} times the memory would do" * (
        free.num_bytes > 0
    )
    if len(need.weights) > 1:
        largest = max(need.weights, key=lambda name: need.weights[name])
        factor += f" ({largest} is the largest model, {format_memory(need.weights[largest])})"
    return InsufficientMemory(
        f"{text}{factor}: use fewer bits per weight (`quantization: int8`), fewer models, "
        "`sleeping: true` for models that are rarely used, or more devices"
    )


def _check(needs: dict[jax.Device, MemoryNeed], subject: str) -> None:
    on_host = [need for device, need in needs.items() if device.platform == "cpu"]
    free = host_free_memory() if on_host else None
    if free is not None and _sum(on_host).total > free.num_bytes:
        raise insufficient_memory(subject, _sum(on_host), free)
    for device, need in needs.items():
        if device.platform == "cpu":
            continue
        free = _device_free_memory(device)
        if free is not None and need.total > free.num_bytes:
            raise insufficient_memory(subject, need, free)


def _device_free_memory(device: jax.Device) -> FreeMemory | None:
    stats = device.memory_stats()
    if stats is None or "bytes_limit" not in stats:
        return None
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return FreeMemory(max(0, free), f"on device {device.id} ({device.device_kind})")


def _need(specs: Iterable[ModelBuildSpec], *, pool: int, weights: bool = True) -> MemoryNeed:
    specs = list(specs)
    return MemoryNeed(
        weights={spec.model.name: spec.model.param_bytes if weights else 0 for spec in specs},
        pool=pool,
        slots=sum(_slot_bytes(spec) for spec in specs),
        steps=max((_step_bytes(spec) for spec in specs), default=0),
    )


def _sum(needs: Sequence[MemoryNeed]) -> MemoryNeed:
    weights: dict[str, int] = {}
    for need in needs:
        for name, size in need.weights.items():
            weights[name] = weights.get(name, 0) + size
    # One step of each unit or device may run at a time.
    pool, slots, steps = (
        sum(getattr(need, field) for need in needs) for field in ("pool", "slots", "steps")
    )
    return MemoryNeed(weights, pool, slots, steps)


def _slot_bytes(spec: ModelBuildSpec) -> int:
    create = partial(SlotState.create, spec.buckets.max_seqs, spec.shards.config.vocab_size)
    leaves = jax.tree.leaves(jax.eval_shape(create))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _step_bytes(spec: ModelBuildSpec) -> int:
    """Bytes of a step's activations and logits, in float32."""
    local, buckets = spec.shards.local, spec.buckets
    hidden = max(buckets.prefill_tokens) * (local.hidden_size + 2 * local.intermediate_size)
    rows = max(*buckets.decode_seqs, buckets.prefill_seqs)
    return 4 * max(hidden, rows * spec.shards.config.vocab_size)


def _local(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """The devices of this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    return any(
        sign in text for sign in ("RESOURCE_EXHAUSTED", "Out of memory", "can't start new thread")
    )


def _round_up(factor: float) -> str:
    return f"{math.ceil(factor * 10) / 10:.1f}"
