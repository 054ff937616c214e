"""Compiles a fleet's steps for devices that are not present, and reports memory and kernels.

Weights are shapes only. Nothing is loaded or executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from rich.table import Table

from muxjax.compile_check.devices import DescribedDevices
from muxjax.compile_check.hlo import count_collectives, find_copies, find_kernels
from muxjax.config.fleet_file import FleetConfig
from muxjax.config.memory_size import format_memory
from muxjax.executor.programs import ModelPrograms
from muxjax.units.build import build_programs
from muxjax.units.build_unit_spec import build_unit_spec


@dataclass(frozen=True)
class CheckedProgram:
    """One step of one model, compiled.

    Attributes:
      name: model, kind and size, for display.
      model, kind, size: see `programs.Program`.
      compile_seconds: time to trace and compile it.
      argument_bytes: memory of the model's parameters, the pool and the other inputs.
      temp_bytes: memory beside its arguments and results.
      peak_bytes: maximum memory while it runs, arguments included.
      resident_bytes: `peak_bytes` plus the weights of the other models.
      pool_copies: number of instructions that copy the pool; should be 0.
      kernels: bytes of VMEM by Pallas kernel (None on a GPU).
      collectives: by kind, number of collectives in one pass over the model: a prefill, or one
        token of a decode.
      fits: whether `resident_bytes` fit the device; None if its memory is not known.
      error: reason of a failed compilation, which leaves the results None.
    """

    name: str
    model: str
    kind: str
    size: int
    compile_seconds: float | None = None
    argument_bytes: int | None = None
    temp_bytes: int | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    pool_copies: int | None = None
    kernels: dict[str, int | None] = field(default_factory=dict)
    collectives: dict[str, int] = field(default_factory=dict)
    fits: bool | None = None
    error: str | None = None


@dataclass(frozen=True)
class CompileCheck:
    """The result of compiling a fleet's programs for a target.

    All sizes, here and in the programs, are per device.

    Attributes:
      target: the devices, as requested.
      device_kind: JAX's name of the devices.
      devices: number of the target's devices that the fleet runs on.
      memory_bytes: of a device; None if it is not known.
      pool_bytes: of the pool.
      weight_bytes: of all models' parameters.
      programs: one for each step of each model.
    """

    target: str
    device_kind: str
    devices: int
    memory_bytes: int | None
    pool_bytes: int
    weight_bytes: int
    programs: list[CheckedProgram]

    @property
    def passed(self) -> bool:
        """Whether every program compiles, and no program is known not to fit."""
        return all(p.error is None and p.fits is not False for p in self.programs)

    def as_json(self) -> dict[str, Any]:
        """Returns the fields, and `passed`, as JSON values."""
        return asdict(self) | {"passed": self.passed}


def compile_check(
    config: FleetConfig,
    target: DescribedDevices,
    *,
    on_start: Callable[[int], None] = lambda total: None,
    on_compiled: Callable[[CheckedProgram], None] = lambda program: None,
) -> CompileCheck:
    """Compiles all programs of a fleet, one after the other.

    Args:
      config: the fleet file.
      target: devices to compile for; the first `tensor_parallel` of them are used.
      on_start: called with the number of programs.
      on_compiled: called with each program when it is compiled.

    Raises:
      CheckpointError, FleetConfigError, PoolTooSmall: the fleet cannot be loaded.
      TargetUnavailable: the target has fewer devices.
    """
    devices = target.first(config.tensor_parallel)
    with target.tracing(len(devices)):
        spec = build_unit_spec(config, memory_bytes=target.memory_bytes, devices=devices)
        models = build_programs(spec)
        weights = {name: model.param_bytes for name, model in spec.models.items()}
        on_start(sum(len(programs.buckets.program_keys) for programs in models.values()))
        programs = []
        for checked in _compile_all(models, spec.kv, weights, target.memory_bytes):
            on_compiled(checked)
            programs.append(checked)
    return CompileCheck(
        target=target.target,
        device_kind=target.device_kind,
        devices=len(devices),
        memory_bytes=target.memory_bytes,
        pool_bytes=spec.pool_bytes,
        weight_bytes=sum(weights.values()),
        programs=programs,
    )


def _compile_all(
    models: dict[str, ModelPrograms],
    kv: jax.ShapeDtypeStruct,
    weights: dict[str, int],
    memory_bytes: int | None,
) -> Iterator[CheckedProgram]:
    for name, programs in models.items():
        others = sum(weights.values()) - weights[name]
        for kind, size in programs.buckets.program_keys:
            row: dict[str, Any] = {
                "name": f"{name} {kind} {size}",
                "model": name,
                "kind": kind,
                "size": size,
            }
            try:
                program = programs.compile(kind, size)
            except jax.errors.JaxRuntimeError as error:
                # Raised by the compiler, for example for an array that the device cannot hold.
                too_large = "RESOURCE_EXHAUSTED" in str(error)
                message = str(error).strip().splitlines()[0]
                yield CheckedProgram(**row, fits=False if too_large else None, error=message)
                continue
            hlo = program.compiled.as_text()
            assert hlo is not None, "ahead-of-time compilers return the text of their programs"
            resident = program.peak_bytes + others
            yield CheckedProgram(
                **row,
                compile_seconds=program.compile_seconds,
                argument_bytes=program.argument_bytes,
                temp_bytes=program.temp_bytes,
                peak_bytes=program.peak_bytes,
                resident_bytes=resident,
                pool_copies=len(find_copies(hlo, kv)),
                kernels=find_kernels(hlo),
                collectives=count_collectives(hlo),
                fits=None if memory_bytes is None else resident <= memory_bytes,
            )


def check_table(check: CompileCheck) -> Table:
    """Returns a table of the programs."""
    memory = "memory unknown" if check.memory_bytes is None else _size(check.memory_bytes)
    title = (
        f"{check.device_kind}, {_devices(check)} of {check.target} ({memory}): "
        f"pool {_size(check.pool_bytes)}, weights {_size(check.weight_bytes)}"
    )
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="")
    table.add_column("program")
    for heading in ("compiled in", "arguments", "temp", "peak", "with other models"):
        table.add_column(heading, justify="right")
    table.add_column("kernels, their VMEM", overflow="fold")
    if check.devices > 1:
        table.add_column("collectives", overflow="fold")
    table.add_column("fits", overflow="fold")
    fits = {True: "yes", False: "no", None: "unknown"}
    for program in check.programs:
        sizes = (
            program.argument_bytes,
            program.temp_bytes,
            program.peak_bytes,
            program.resident_bytes,
        )
        kernels = (f"{name} {_size(size)}".strip() for name, size in program.kernels.items())
        seconds = program.compile_seconds
        collectives = ", ".join(f"{count} {kind}" for kind, count in program.collectives.items())
        table.add_row(
            program.name,
            "" if seconds is None else f"{seconds:.1f} s",
            *map(_size, sizes),
            ", ".join(kernels),
            *([collectives] if check.devices > 1 else []),
            fits[program.fits],
        )
    return table


def check_faults(check: CompileCheck) -> list[str]:
    """Returns a line for each program that does not compile or copies the pool."""
    faults = [f"{p.name} does not compile: {p.error}" for p in check.programs if p.error]
    return faults + [
        f"{p.name} copies the pool {p.pool_copies} times" for p in check.programs if p.pool_copies
    ]


def _devices(check: CompileCheck) -> str:
    return "one device" if check.devices == 1 else f"each of {check.devices} devices"


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_memory(num_bytes)
