"""Builds the spec of a unit from a fleet file: opens checkpoints, lays out the pool."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax

from muxjax.config.fleet_file import FleetConfig
from muxjax.config.model_entry import ModelEntry
from muxjax.errors import FleetConfigError
from muxjax.executor.mesh import ModelMesh
from muxjax.models.checkpoints.loading import open_checkpoint
from muxjax.models.nn.shards import Shards
from muxjax.models.nn.weight_format import stored_bytes
from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.cpu import native
from muxjax.pallas_kernels.target import current_target
from muxjax.scheduling.demand import DemandFunction, expected_demand
from muxjax.units.build_model_spec import build_model_spec, pool_dtype, resolve_dtype
from muxjax.units.page_geometry import GPU_TOKEN_GROUP, KVShape, choose_page_rows, page_count
from muxjax.units.unit_spec import ModelBuildSpec, UnitSpec

log = logging.getLogger("muxjax")

_CPU_POOL_BYTES = 1 << 30
_ACCELERATOR_POOL_FRACTION = 0.9
"""Pool size on an accelerator, as a fraction of the memory that the weights leave free."""


def build_unit_spec(
    config: FleetConfig,
    *,
    progress: bool = True,
    poison: bool = False,
    memory_bytes: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    demand: DemandFunction = expected_demand,
) -> UnitSpec:
    """Opens the checkpoints of a single-unit fleet, and lays out its pool.

    Args:
      config: the fleet file.
      progress: show progress bars while files are downloaded.
      poison: test mode, see `Fleet.load`.
      memory_bytes: free memory of a device; by default read from the first device.
      devices: of the unit; by default the first `tensor_parallel` devices of JAX.
      demand: expected demand of the models.

    Raises:
      CheckpointError, DownloadError: a checkpoint cannot be opened.
      PoolTooSmall: the pool cannot hold one request of each model.
      FleetConfigError: a `max_model_len` is beyond the model's context length.
    """
    devices = unit_devices(config) if devices is None else tuple(devices)
    checkpoints = {
        entry.name: open_checkpoint(entry.source, config_mapping=entry.config, progress=progress)
        for entry in config.models
    }
    dtypes = [resolve_dtype(entry) for entry in config.models]
    kv_dtype = pool_dtype(dtypes)
    meshes = {entry.name: _model_mesh(entry, devices) for entry in config.models}
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
        memory = _default_pool_bytes(weights, memory_bytes, devices)
    else:
        memory = config.pool.memory // len(devices)
    kv = jax.ShapeDtypeStruct((page_count(memory, rows, kv_dtype.itemsize), rows, 128), kv_dtype)
    max_layers = max(model.num_layers for model in local.values())
    model_specs = {
        entry.name: build_model_spec(
            entry,
            checkpoints[entry.name],
            meshes[entry.name],
            kv,
            config.engine,
            free_pages=kv.shape[0] - max_layers,
            available=_available(config.models, entry),
        )
        for entry in config.models
    }
    spec = UnitSpec(config, devices, kv, model_specs, demand, poison)
    spec.build_scheduler()  # raises PoolTooSmall
    if current_target().platform == "cpu" and (reason := native.unavailable_reason()):
        log.info("matrix products and attention use XLA, not the native CPU kernels: %s", reason)
    return spec


def build_added_model_spec(
    unit: UnitSpec, entry: ModelEntry, *, progress: bool = False
) -> ModelBuildSpec:
    """Opens the checkpoint of a model that is added to an existing unit.

    Args:
      unit: its spec; a model of the same name is replaced.
      entry: of the model, as in the fleet file.
      progress: show progress bars while files are downloaded.

    Raises:
      CheckpointError, DownloadError: the checkpoint cannot be opened.
      FleetConfigError: the model does not fit the pool's layout.
      PoolTooSmall: the pool has no room for a request of the new model.
    """
    checkpoint = open_checkpoint(entry.source, config_mapping=entry.config, progress=progress)
    mesh = _model_mesh(entry, unit.devices)
    local, page_rows = Shards(checkpoint.config, mesh.tp_size).local, unit.kv.shape[1]
    token_rows = KVLayout(10**9, local.num_kv_heads, local.head_dim).rows_per_token
    if token_rows > page_rows:
        raise FleetConfigError(
            f"{entry.name} needs {token_rows} rows of the pool per token, and a page of this pool "
            f"has {page_rows}: add it to the fleet file and restart the server"
        )
    if pool_dtype([resolve_dtype(entry)]).itemsize > unit.kv.dtype.itemsize:
        raise FleetConfigError(
            f"{entry.name} is {resolve_dtype(entry)}, and this pool is {unit.kv.dtype}: add it to "
            "the fleet file and restart the server, or set its `dtype` to the pool's"
        )
    others = [spec.entry for name, spec in unit.model_specs.items() if name != entry.name]
    depths = [spec.spec.num_layers for spec in unit.model_specs.values()]
    spec = build_model_spec(
        entry,
        checkpoint,
        mesh,
        unit.kv,
        unit.config.engine,
        free_pages=unit.kv.shape[0] - max([local.num_layers, *depths]),
        available=_available([*others, entry], entry),
    )
    unit.add_model(spec).build_scheduler()  # raises PoolTooSmall
    return spec


def unit_devices(config: FleetConfig) -> tuple[jax.Device, ...]:
    """Returns the devices of a single-unit fleet: the first `tensor_parallel` of JAX.

    Raises:
      FleetConfigError: JAX has fewer devices.
    """
    devices = jax.devices()
    if config.tensor_parallel > len(devices):
        hint = ""
        if devices[0].platform == "cpu":
            hint = (
                "; to split a CPU, set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={config.tensor_parallel}"
            )
        raise FleetConfigError(
            f"tensor_parallel is {config.tensor_parallel}, and JAX sees {len(devices)} "
            f"device{'s' if len(devices) > 1 else ''} ({devices[0].device_kind}){hint}"
        )
    return tuple(devices[: config.tensor_parallel])


def _available(entries: Sequence[ModelEntry], entry: ModelEntry) -> float:
    """Returns the fraction of the pool that is not guaranteed to other models."""
    return 1 - sum(other.kv_floor or 0.0 for other in entries) + (entry.kv_floor or 0.0)


def _model_mesh(entry: ModelEntry, devices: tuple[jax.Device, ...]) -> ModelMesh:
    tp_size = entry.tensor_parallel or len(devices)
    if len(devices) % tp_size:
        raise FleetConfigError(
            f"tensor_parallel of {entry.name} is {tp_size}, which does not divide the "
            f"{len(devices)} devices of its unit"
        )
    return ModelMesh(devices, tp_size)


def _default_pool_bytes(
    weights: int, memory_bytes: int | None, devices: Sequence[jax.Device]
) -> int:
    """Returns the pool's bytes on each device, next to `weights` bytes of weights."""
    if current_target().platform == "cpu":
        return _CPU_POOL_BYTES // len(devices)
    if memory_bytes is None:
        memory_bytes = _free_memory(devices[0])
    return max(1, int((memory_bytes - weights) * _ACCELERATOR_POOL_FRACTION))


def _free_memory(device: jax.Device) -> int:
    stats = device.memory_stats()
    if stats is None or "bytes_limit" not in stats:
        raise FleetConfigError(f"set pool.memory: {device} does not report its memory")
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
