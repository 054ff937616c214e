"""Compiles a fleet's steps for devices that are not here, and says what they take.

Weights are shapes only; nothing is loaded, nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from rich.table import Table

from muxjax.compile_check.devices import DescribedDevices
from muxjax.compile_check.hlo import collectives, copies_of, kernels
from muxjax.config.fleet_file import FleetConfig
from muxjax.executor.programs import ModelPrograms
from muxjax.units import build as loading

_MB = 10**6


@dataclass(frozen=True)
class CheckedProgram:
    """One step of one model, compiled.

    Attributes:
      name: of model, kind and size, for people.
      model, kind, size: the same apart (`programs.Program`).
      compile_seconds: tracing and compiling.
      argument_bytes: the model's parameters, the pool and the small inputs.
      temp_bytes: what it needs besides.
      peak_bytes: the most that is held at once, arguments included.
      resident_bytes: `peak_bytes` and the weights of the other models, which stay where they are.
      pool_copies: instructions that copy the pool; there should be none.
      kernels: Pallas kernels in it, and the bytes of VMEM that each takes (None on a GPU).
      collectives: how often each kind of collective runs in one pass over the model: a prefill, or
        one token of a decode.
      fits: whether the device holds `resident_bytes`; None where its memory is not known.
      error: why it does not compile, or None. What compiling would have told is None then.
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
    """A fleet's programs for one device, or for some that its models are cut for.

    All bytes, here and in the programs, are those of one device.

    Attributes:
      target, device_kind: the devices, as asked for and as their maker calls them.
      devices: how many of the target the fleet runs on.
      memory_bytes: of a device, or None where that is not known.
      pool_bytes: of the pool.
      weight_bytes: of all models' parameters.
      programs: what was compiled.
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
        """Whether everything compiles and nothing is known not to fit."""
        return all(p.error is None and p.fits is not False for p in self.programs)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def compile_check(
    config: FleetConfig,
    target: DescribedDevices,
    *,
    started: Callable[[int], None] = lambda total: None,
    compiled: Callable[[CheckedProgram], None] = lambda program: None,
) -> CompileCheck:
    """Compiles all programs of a fleet, one after the other.

    Args:
      config: the fleet file.
      target: what to compile for: the first devices, as many as `tensor_parallel` says.
      started: told how many programs there will be.
      compiled: told each as it is ready.

    Raises:
      CheckpointError, FleetConfigError, PoolTooSmall: as loading the fleet would.
      TargetUnavailable: the target has fewer devices.
    """
    devices = target.first(config.tensor_parallel)
    with target.tracing(len(devices)):
        plan = loading.build_unit_spec(config, memory_bytes=target.memory_bytes, devices=devices)
        models = loading.make_programs(plan)
        weights = {name: model.param_bytes for name, model in plan.models.items()}
        started(sum(len(programs.wanted()) for programs in models.values()))
        programs = []
        for checked in _compile_all(models, plan.kv, weights, target.memory_bytes):
            compiled(checked)
            programs.append(checked)
    return CompileCheck(
        target=target.target,
        device_kind=target.device_kind,
        devices=len(devices),
        memory_bytes=target.memory_bytes,
        pool_bytes=plan.pool_bytes,
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
        for kind, size in programs.wanted():
            row: dict[str, Any] = {
                "name": f"{name} {kind} {size}",
                "model": name,
                "kind": kind,
                "size": size,
            }
            try:
                program = programs.compile(kind, size)
            except jax.errors.JaxRuntimeError as error:
                # The compiler's own refusal, such as an array that the device cannot hold.
                too_large = "RESOURCE_EXHAUSTED" in str(error)
                message = str(error).strip().splitlines()[0]
                yield CheckedProgram(**row, fits=False if too_large else None, error=message)
                continue
            hlo = program.compiled.as_text()
            assert hlo is not None, "compilers that work ahead of time print their programs"
            resident = program.peak_bytes + others
            yield CheckedProgram(
                **row,
                compile_seconds=program.compile_seconds,
                argument_bytes=program.argument_bytes,
                temp_bytes=program.temp_bytes,
                peak_bytes=program.peak_bytes,
                resident_bytes=resident,
                pool_copies=len(copies_of(hlo, kv)),
                kernels=kernels(hlo),
                collectives=collectives(hlo),
                fits=None if memory_bytes is None else resident <= memory_bytes,
            )


def table_of(check: CompileCheck) -> Table:
    """The programs for people."""
    memory = "memory not known" if check.memory_bytes is None else _size(check.memory_bytes)
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
    fits = {True: "yes", False: "no", None: "not known"}
    for program in check.programs:
        sizes = (
            program.argument_bytes,
            program.temp_bytes,
            program.peak_bytes,
            program.resident_bytes,
        )
        kernels = (f"{name} {_size(size)}".strip() for name, size in program.kernels.items())
        seconds = program.compile_seconds
        sums = ", ".join(f"{count} {kind}" for kind, count in program.collectives.items())
        table.add_row(
            program.name,
            "" if seconds is None else f"{seconds:.1f} s",
            *map(_size, sizes),
            ", ".join(kernels),
            *([sums] if check.devices > 1 else []),
            fits[program.fits],
        )
    return table


def faults_of(check: CompileCheck) -> list[str]:
    """A line for each thing that is wrong with a program."""
    faults = [f"{p.name} does not compile: {p.error}" for p in check.programs if p.error]
    return faults + [
        f"{p.name} copies the whole pool {p.pool_copies} times"
        for p in check.programs
        if p.pool_copies
    ]


def _devices(check: CompileCheck) -> str:
    return "one device" if check.devices == 1 else f"each of {check.devices} devices"


def _size(number: int | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e9:.1f} GB" if number >= 1000 * _MB else f"{number / _MB:.1f} MB"
