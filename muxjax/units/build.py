"""Builds a unit from its spec: programs, weights, executor, scheduler and engine.

A unit is started with `build_unit_spec`, then `build_unit`. The single steps are also public:
`build_programs` for the compile check, `load_programs` and `UnitSpec.build_executor` for the other
hosts of a mesh and for benchmarks of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import jax

from muxjax.executor.programs import ModelPrograms, Program
from muxjax.models.nn.weight_format import stored_params
from muxjax.progress import Bars
from muxjax.scheduling.routing import PlannedLoad
from muxjax.units.local_unit import ExecutorFactory, LocalUnit
from muxjax.units.memory_check import check_model_fits, check_units_fit, explain_out_of_memory
from muxjax.units.unit_spec import ModelBuildSpec, UnitSpec
from muxjax.units.weights import build_decoder, layer_stacks, load_weights

_WORKERS = 2
"""Threads that load and compile. Tracing needs Python's lock; compiling and reading do not."""


def build_unit(
    spec: UnitSpec,
    name: str = "0",
    *,
    progress: Bars | None = None,
    planned_load: PlannedLoad | None = None,
    executor_factory: ExecutorFactory | None = None,
) -> LocalUnit:
    """Loads the weights, compiles the programs, and starts the engine of a unit.

    Models that are `sleeping` are loaded when they are woken.

    Args:
      spec: from `build_unit_spec`.
      name: of the unit; "0" in a fleet without a plan.
      progress: from `load_progress`; None shows nothing.
      planned_load: what the plan expects of the unit.
      executor_factory: see `LocalUnit`.

    Raises:
      CheckpointError: a weight cannot be read.
      InsufficientMemory: the unit needs more memory than is free.
    """
    programs = load_programs(spec, progress=progress)
    with explain_out_of_memory():
        return LocalUnit(
            name,
            spec,
            programs,
            planned_load=planned_load,
            executor_factory=executor_factory,
        )


def load_progress(units: Iterable[UnitSpec], *, show: bool, include_sleeping: bool = False) -> Bars:
    """Returns the progress bars for loading units: programs to compile, bytes to load.

    Args:
      units: specs of the units.
      show: False shows nothing.
      include_sleeping: as for `load_programs`.
    """
    models = [spec for unit in units for spec in _initial_specs(unit, include_sleeping).values()]
    totals = {
        "compiling": sum(len(spec.buckets.program_keys) for spec in models),
        "loading weights": sum(spec.model.param_bytes for spec in models),
    }
    return Bars(totals, show=show)


def load_programs(
    spec: UnitSpec, *, progress: Bars | None = None, include_sleeping: bool = False
) -> dict[str, ModelPrograms]:
    """Returns the programs of a unit's models, compiled and with their weights.

    Args:
      spec: of the unit.
      progress: from `load_progress`; None shows nothing.
      include_sleeping: also load models that are `sleeping`; by default they are neither loaded nor
        compiled.

    Raises:
      CheckpointError: a weight cannot be read; raised after the work in progress has ended.
      InsufficientMemory: the unit needs more memory than is free.
    """
    check_units_fit([spec], include_sleeping=include_sleeping)
    programs, initial = build_programs(spec), _initial_specs(spec, include_sleeping)

    def on_loaded(name: str, size: int) -> None:
        if progress is not None:
            progress.advance("loading weights", size, name)

    def on_compiled(program: Program) -> None:
        if progress is not None:
            progress.advance("compiling", 1, program.title)

    with explain_out_of_memory():
        load_and_compile(
            initial,
            {name: programs[name] for name in initial},
            on_loaded=on_loaded,
            on_compiled=on_compiled,
        )
    return programs


def _initial_specs(spec: UnitSpec, include_sleeping: bool) -> dict[str, ModelBuildSpec]:
    return spec.model_specs if include_sleeping else spec.awake_specs


def build_programs(spec: UnitSpec) -> dict[str, ModelPrograms]:
    """Returns the uncompiled programs of a unit's models; their parameters are shapes only."""
    return {name: build_model_programs(model, spec.kv) for name, model in spec.model_specs.items()}


def build_model_programs(spec: ModelBuildSpec, kv: jax.ShapeDtypeStruct) -> ModelPrograms:
    """Returns the uncompiled programs of one model; its parameters are shapes only.

    Args:
      spec: of the model.
      kv: shape and type of its unit's pool on one device.
    """
    local = spec.shards.local
    shapes = stored_params(local, spec.model.dtype, spec.model.quantization, layer_stacks(local))
    return ModelPrograms(
        spec.model.name,
        build_decoder(spec, shapes),
        spec.functions,
        spec.buckets,
        kv,
        spec.mesh,
    )


def load_model_programs(spec: ModelBuildSpec, programs: ModelPrograms) -> None:
    """Loads the weights and compiles the programs of one model.

    Raises:
      CheckpointError, JaxRuntimeError: the model cannot be loaded; all its memory is freed.
      InsufficientMemory: it needs more memory than is free; nothing was loaded.
    """
    check_model_fits(spec)
    name = spec.model.name
    try:
        load_and_compile({name: spec}, {name: programs})
    except BaseException:
        programs.free()
        raise


def load_and_compile(
    specs: Mapping[str, ModelBuildSpec],
    programs: Mapping[str, ModelPrograms],
    *,
    on_loaded: Callable[[str, int], None] = lambda name, size: None,
    on_compiled: Callable[[Program], None] = lambda program: None,
) -> None:
    """Compiles all programs and loads the weights of all models, in parallel.

    Args:
      specs: of the models, with the source of their weights.
      programs: of the same models; compiled here, and given their parameters.
      on_loaded: called with the model and the bytes of each parameter, when it has arrived.
      on_compiled: called with each program, when it is compiled.

    Raises:
      CheckpointError: a weight cannot be read; raised after the work in progress has ended.
    """

    def load(name: str) -> None:
        programs[name].set_parameters(load_weights(specs[name], partial(on_loaded, name)))

    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="muxjax-load") as pool:
        # Weights first: they take less time, and their worker then compiles.
        futures: list[Future[Any]] = [pool.submit(load, name) for name in programs]
        futures += [
            pool.submit(model.compile, kind, size)
            for model in programs.values()
            for kind, size in model.buckets.program_keys
        ]
        try:
            for future in as_completed(futures):
                program = future.result()
                if program is not None:
                    on_compiled(program)
        finally:
            for future in futures:
                future.cancel()
