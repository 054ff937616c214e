"""From a fleet file to a unit that is ready to run: checkpoints, geometry, weights, programs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import jax

from muxjax.cache import cache_folder
from muxjax.config.fleet_file import FleetConfig, ModelEntry
from muxjax.errors import FleetConfigError
from muxjax.executor.mesh import ModelMesh
from muxjax.executor.programs import ModelPrograms, Program
from muxjax.models.checkpoints.loading import open_checkpoint
from muxjax.models.nn.shards import Shards
from muxjax.models.nn.weight_format import stored_bytes, stored_params
from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.cpu import native
from muxjax.pallas_kernels.target import current_target
from muxjax.scheduling.demand import expected_demand
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.specs import Demand, ModelSpec
from muxjax.units.page_geometry import GPU_TOKEN_GROUP, KVShape, choose_page_rows, pages_in
from muxjax.units.unit_spec import ModelBuildSpec, UnitSpec, dtype_of, kv_dtype, spec_model
from muxjax.units.weights import decoder_of, load_weights, stacks_of

log = logging.getLogger("muxjax")

_CPU_POOL_BYTES = 1 << 30
_ACCELERATOR_POOL_SHARE = 0.9
"""Part of the memory left beside the weights that the pool takes on an accelerator."""
_WORKERS = 2
"""Threads that load and compile: tracing holds Python's lock, compiling and reading do not."""


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache folder.

    A cache that the user has configured (`JAX_COMPILATION_CACHE_DIR`) is left as it is.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = cache_folder() / "xla" / f"jax-{jax.__version__}-{jax.default_backend()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def build_unit_spec(
    config: FleetConfig,
    *,
    progress: bool = True,
    poison: bool = False,
    memory_bytes: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    demand: Callable[[ModelSpec, StepEstimates], Demand] = expected_demand,
) -> UnitSpec:
    """Opens the checkpoints and cuts the pool.

    Args:
      config: the fleet file.
      progress: show bars while something is fetched.
      poison: test mode, see `Fleet.load`.
      memory_bytes: free memory of a device; by default the first is asked.
      devices: of the unit; by default the first of JAX's, as many as `tensor_parallel` says.
      demand: what the models are expected to need.

    Raises:
      CheckpointError, DownloadError: a checkpoint that cannot be had.
      PoolTooSmall: the pool cannot hold the fleet.
      FleetConfigError: a length beyond the model's own.
    """
    devices = unit_devices(config) if devices is None else tuple(devices)
    checkpoints = {
        entry.name: open_checkpoint(entry.source, config_mapping=entry.config, progress=progress)
        for entry in config.models
    }
    dtypes = [dtype_of(entry) for entry in config.models]
    itemsize = kv_dtype(dtypes).itemsize
    meshes = {entry.name: _mesh(entry, devices) for entry in config.models}
    local = {
        name: Shards(checkpoint.config, meshes[name].tp_size).local  # of one device
        for name, checkpoint in checkpoints.items()
    }
    rows = choose_page_rows(
        [
            KVShape(
                entry.name,
                local[entry.name].num_layers,
                local[entry.name].num_kv_heads,
                local[entry.name].head_dim,
                entry.expected_load.request_tokens,
            )
            for entry in config.models
        ],
        token_group=GPU_TOKEN_GROUP if current_target().platform == "gpu" else 1,
    )
    if config.pool.memory is None:
        weights = sum(
            stored_bytes(local[entry.name], dtype, entry.quantization)
            for entry, dtype in zip(config.models, dtypes, strict=True)
            if not entry.sleeping
        )
        memory = _default_pool(weights, memory_bytes, devices)
    else:
        memory = config.pool.memory // len(devices)
    kv = jax.ShapeDtypeStruct((pages_in(memory, rows, itemsize), rows, 128), kv_dtype(dtypes))
    deepest = max(model.num_layers for model in local.values())
    parts = {
        entry.name: spec_model(
            entry,
            checkpoints[entry.name],
            meshes[entry.name],
            kv,
            config.engine,
            free_pages=kv.shape[0] - deepest,
            available=_available(config.models, entry),
        )
        for entry in config.models
    }
    plan = UnitSpec(config, devices, kv, parts, demand, poison)
    plan.make_unit()  # refuses a pool that is too small
    if current_target().platform == "cpu" and (reason := native.unavailable_reason()):
        log.info("products and attention are XLA's, not the CPU's own kernels: %s", reason)
    return plan


def spec_added_model(
    plan: UnitSpec, entry: ModelEntry, *, progress: bool = False
) -> ModelBuildSpec:
    """A model for a unit that exists, in place of the one of its name if there is one.

    Args:
      plan: the unit's.
      entry: what the fleet file says of the model.
      progress: show bars while something is fetched.

    Raises:
      CheckpointError, DownloadError: a checkpoint that cannot be had.
      FleetConfigError: the model does not fit the pool as it is cut.
      PoolTooSmall: the pool cannot hold it beside the others.
    """
    checkpoint = open_checkpoint(entry.source, config_mapping=entry.config, progress=progress)
    mesh = _mesh(entry, plan.devices)
    local, rows = Shards(checkpoint.config, mesh.tp_size).local, plan.kv.shape[1]
    wide = KVLayout(10**9, local.num_kv_heads, local.head_dim).rows_per_token
    if wide > rows:
        raise FleetConfigError(
            f"{entry.name} takes {wide} rows of the pool a token, and a page of this pool has "
            f"{rows}: restart the server with it in the fleet file"
        )
    if kv_dtype([dtype_of(entry)]).itemsize > plan.kv.dtype.itemsize:
        raise FleetConfigError(
            f"{entry.name} is of {dtype_of(entry)}, and this pool of {plan.kv.dtype}: restart the "
            "server with it in the fleet file, or give it the pool's `dtype`"
        )
    others = [part.entry for name, part in plan.parts.items() if name != entry.name]
    deepest = max([local.num_layers, *(part.spec.num_layers for part in plan.parts.values())])
    part = spec_model(
        entry,
        checkpoint,
        mesh,
        plan.kv,
        plan.config.engine,
        free_pages=plan.kv.shape[0] - deepest,
        available=_available([*others, entry], entry),
    )
    plan.having(part).make_unit()  # refuses a pool that is too small
    return part


def _available(entries: Sequence[ModelEntry], entry: ModelEntry) -> float:
    """The part of the pool that is not guaranteed to others."""
    return 1 - sum(other.kv_floor or 0.0 for other in entries) + (entry.kv_floor or 0.0)


def unit_devices(config: FleetConfig) -> tuple[jax.Device, ...]:
    """The devices of a fleet that is one unit: the first of JAX's.

    Raises:
      FleetConfigError: there are fewer than `tensor_parallel` asks for.
    """
    found = jax.devices()
    if config.tensor_parallel > len(found):
        hint = ""
        if found[0].platform == "cpu":
            hint = (
                "; to split a CPU, set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={config.tensor_parallel}"
            )
        raise FleetConfigError(
            f"tensor_parallel is {config.tensor_parallel}, and JAX sees {len(found)} "
            f"device{'s' if len(found) > 1 else ''} ({found[0].device_kind}){hint}"
        )
    return tuple(found[: config.tensor_parallel])


def _mesh(entry: ModelEntry, devices: tuple[jax.Device, ...]) -> ModelMesh:
    tp_size = entry.tensor_parallel or len(devices)
    if len(devices) % tp_size:
        raise FleetConfigError(
            f"tensor_parallel of {entry.name} is {tp_size}, which does not divide the "
            f"{len(devices)} devices of its unit"
        )
    return ModelMesh(devices, tp_size)


def make_programs(plan: UnitSpec) -> dict[str, ModelPrograms]:
    """The programs of a plan, with parameters that are shapes only: enough to compile."""
    return {name: programs_of(part, plan.kv) for name, part in plan.parts.items()}


def programs_of(part: ModelBuildSpec, kv: jax.ShapeDtypeStruct) -> ModelPrograms:
    """The programs of one model, with parameters that are shapes only.

    Args:
      part: the model.
      kv: its unit's pool on one device.
    """
    local = part.shards.local
    kept = stored_params(local, part.model.dtype, part.model.quantization, stacks_of(local))
    return ModelPrograms(
        part.model.name, decoder_of(part, kept), part.functions, part.buckets, kv, part.mesh
    )


def load_and_compile(
    parts: Mapping[str, ModelBuildSpec],
    programs: Mapping[str, ModelPrograms],
    *,
    loaded: Callable[[str, int], None],
    compiled: Callable[[Program], None],
) -> None:
    """Compiles all programs, and meanwhile reads the weights of all models to the device.

    Args:
      parts: where the weights come from.
      programs: what is compiled, and given their parameters.
      loaded: told the model and the bytes of each parameter as it arrives.
      compiled: told each program as it is ready.

    Raises:
      CheckpointError: a weight that cannot be read; what had begun is waited for.
    """

    def load(name: str) -> None:
        programs[name].set_parameters(load_weights(parts[name], partial(loaded, name)))

    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="muxjax-load") as pool:
        # Weights first: reading them is short, and frees its worker for compiling.
        work: list[Future[Any]] = [pool.submit(load, n) for n in programs]
        work += [
            pool.submit(model.compile, kind, size)
            for model in programs.values()
            for kind, size in model.wanted()
        ]
        try:
            for future in as_completed(work):
                program = future.result()
                if program is not None:
                    compiled(program)
        finally:
            for future in work:
                future.cancel()


def _default_pool(weights: int, memory_bytes: int | None, devices: Sequence[jax.Device]) -> int:
    """Bytes on each device."""
    if current_target().platform == "cpu":
        return _CPU_POOL_BYTES // len(devices)
    if memory_bytes is None:
        memory_bytes = _free_memory(devices[0])
    return max(1, int((memory_bytes - weights) * _ACCELERATOR_POOL_SHARE))


def _free_memory(device: jax.Device) -> int:
    stats = device.memory_stats()
    if stats is None or "bytes_limit" not in stats:
        raise FleetConfigError(f"pool.memory must be given: the memory of {device} is not known")
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
