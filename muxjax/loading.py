"""From a fleet file to a unit that is ready to run: checkpoints, geometry, weights, programs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.config import EngineConfig, FleetConfig, ModelEntry
from muxjax.errors import FleetConfigError
from muxjax.geometry import (
    GPU_TOKEN_GROUP,
    KVShape,
    choose_page_rows,
    longest_sequence,
    pages_in,
)
from muxjax.mesh import ModelMesh
from muxjax.models.checkpoint import Checkpoint
from muxjax.models.config import ModelConfig
from muxjax.models.demo import cache_folder
from muxjax.models.kept import Dtype, Quantization, kept_bytes, kept_params
from muxjax.models.loading import open_checkpoint
from muxjax.models.params import param_shapes
from muxjax.models.shards import Shards
from muxjax.models.tokenizer import Tokenizer
from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.target import current_target
from muxjax.placement.demand import expected_demand
from muxjax.programs import Buckets, ModelPrograms, Program
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.policies import make_policy
from muxjax.scheduling.pools import pool_of
from muxjax.scheduling.specs import BucketLimits, Demand, LatencyTargets, ModelSpec
from muxjax.scheduling.unit import Unit
from muxjax.steps import StepFunctions
from muxjax.weights import decoder_of, load_weights, stacks_of

log = logging.getLogger("muxjax")

_CPU_POOL_BYTES = 1 << 30
_ACCELERATOR_POOL_SHARE = 0.9
"""Part of the memory left beside the weights that the pool takes on an accelerator."""
_PREFILL_SEQS = 8
_WORKERS = 2
"""Threads that load and compile: tracing holds Python's lock, compiling and reading do not."""


@dataclass(frozen=True)
class LoadedModel:
    """A model of a running fleet.

    Attributes:
      name: what requests call it.
      config: sizes and options.
      tokenizer: None for a model that takes token ids only.
      max_model_len: the most tokens of prompt and output together.
      origin: where it was loaded from.
      dtype: of its matrices, where they are not quantised.
      quantization: of its matrices.
      param_count: number of parameters.
      param_bytes: bytes of all parameters on one device.
      layout: its geometry in the pool, on one device.
      tensor_parallel: devices that one copy of it is cut for.
      copies: copies of it side by side on the unit's devices.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer | None
    max_model_len: int
    origin: str
    dtype: Dtype
    quantization: Quantization
    param_count: int
    param_bytes: int
    layout: KVLayout
    tensor_parallel: int = 1
    copies: int = 1

    @property
    def precision(self) -> str:
        """What its matrices are, for people: a type, or a quantisation."""
        return self.dtype if self.quantization == "none" else self.quantization

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an output: the config's, and what the tokenizer knows besides."""
        known = () if self.tokenizer is None else self.tokenizer.eos_token_ids
        return tuple(dict.fromkeys((*self.config.eos_token_ids, *known)))


@dataclass(frozen=True)
class Plan:
    """What a unit will hold, worked out from headers alone: no weights, no compilation.

    Attributes:
      models: as they will be, in the fleet file's order.
      checkpoints: where their weights come from.
      buckets: what is compiled for each.
      functions: the steps of each, as one device runs them.
      shards: how each is cut.
      meshes: the unit's devices as each uses them.
      kv: the pool's shape `[P, rows, 128]` and type, on one device.
      make_unit: makes the scheduler's state, without any request.
    """

    models: dict[str, LoadedModel]
    checkpoints: dict[str, Checkpoint]
    buckets: dict[str, Buckets]
    functions: dict[str, StepFunctions]
    shards: dict[str, Shards]
    meshes: dict[str, ModelMesh]
    kv: jax.ShapeDtypeStruct
    make_unit: Callable[[], Unit]

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """The unit's."""
        return next(iter(self.meshes.values())).devices

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool on one device."""
        return int(np.prod(self.kv.shape)) * self.kv.dtype.itemsize

    @property
    def dummy_pages(self) -> int:
        """Pages at the start that padding is written to."""
        return max(model.config.num_layers for model in self.models.values())


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache folder.

    A cache that the user has configured (`JAX_COMPILATION_CACHE_DIR`) is left as it is.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = cache_folder() / "xla" / f"jax-{jax.__version__}-{jax.default_backend()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_plan(
    config: FleetConfig,
    *,
    progress: bool = True,
    poison: bool = False,
    memory_bytes: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    demand: Callable[[ModelSpec, StepEstimates], Demand] = expected_demand,
) -> Plan:
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
    dtypes = {entry.name: _dtype(entry) for entry in config.models}
    kv_dtype = _kv_dtype(list(dtypes.values()))
    meshes = {entry.name: _mesh(config, entry, devices) for entry in config.models}
    shards = {
        name: Shards(checkpoint.config, meshes[name].degree)
        for name, checkpoint in checkpoints.items()
    }
    configs = {name: shard.local for name, shard in shards.items()}  # of one device
    rows = choose_page_rows(
        [
            KVShape(
                entry.name,
                configs[entry.name].num_layers,
                configs[entry.name].num_kv_heads,
                configs[entry.name].head_dim,
                entry.prompt_tokens + entry.output_tokens,
            )
            for entry in config.models
        ],
        token_group=GPU_TOKEN_GROUP if current_target().platform == "gpu" else 1,
    )
    weights = {
        entry.name: kept_bytes(configs[entry.name], dtypes[entry.name], entry.quantization)
        for entry in config.models
    }
    if config.pool.memory is None:
        memory = _default_pool(sum(weights.values()), memory_bytes, devices)
    else:
        memory = config.pool.memory // len(devices)
    num_pages = pages_in(memory, rows, kv_dtype.itemsize)

    models, buckets, functions, specs = {}, {}, {}, []
    floors = sum(entry.kv_floor or 0.0 for entry in config.models)
    deepest = max(c.num_layers for c in configs.values())
    for entry in config.models:
        name, model = entry.name, configs[entry.name]
        layout = KVLayout(rows, model.num_kv_heads, model.head_dim)
        if entry.max_model_len is not None and entry.max_model_len > model.max_position:
            raise FleetConfigError(
                f"max_model_len of {name} is {entry.max_model_len}; the model's own context length "
                f"is {model.max_position}"
            )
        length = entry.max_model_len or longest_sequence(
            model.max_position,
            layout,
            model.num_layers,
            num_pages - deepest,
            1 - floors + (entry.kv_floor or 0.0),
        )
        models[name] = LoadedModel(
            name=name,
            config=shards[name].config,
            tokenizer=checkpoints[name].tokenizer,
            max_model_len=length,
            origin=checkpoints[name].origin,
            dtype=dtypes[name],
            quantization=entry.quantization,
            param_count=sum(int(np.prod(s)) for s in param_shapes(shards[name].config).values()),
            param_bytes=weights[name],
            layout=layout,
            tensor_parallel=meshes[name].degree,
            copies=meshes[name].copies,
        )
        spec = _spec(entry, models[name], config.engine)
        specs.append(spec)
        buckets[name] = _buckets(spec, meshes[name].copies)
        functions[name] = StepFunctions(layout, spec.limits.max_decode_tokens)

    def make_unit() -> Unit:
        return Unit(
            specs,
            num_pages,
            make_policy(config.policy),
            demand=demand,
            kv_quotas=pool_of(config.policy),
            refuse_late=config.refuse_late,
            prefix_cache=config.pool.prefix_cache,
            record_freed=poison,
        )

    make_unit()  # refuses a pool that is too small
    kv = jax.ShapeDtypeStruct((num_pages, rows, 128), kv_dtype)
    return Plan(models, checkpoints, buckets, functions, shards, meshes, kv, make_unit)


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


def _mesh(config: FleetConfig, entry: ModelEntry, devices: tuple[jax.Device, ...]) -> ModelMesh:
    degree = entry.tensor_parallel or len(devices)
    if len(devices) % degree:
        raise FleetConfigError(
            f"tensor_parallel of {entry.name} is {degree}, which does not divide the "
            f"{len(devices)} devices of its unit"
        )
    return ModelMesh(devices, degree)


def make_programs(plan: Plan) -> dict[str, ModelPrograms]:
    """The programs of a plan, with parameters that are shapes only: enough to compile."""
    programs = {}
    for name, model in plan.models.items():
        local = plan.shards[name].local
        kept = kept_params(local, model.dtype, model.quantization, stacks_of(local))
        programs[name] = ModelPrograms(
            name,
            decoder_of(plan, name, kept),
            plan.functions[name],
            plan.buckets[name],
            plan.kv,
            plan.meshes[name],
        )
    return programs


def load_and_compile(
    plan: Plan,
    programs: Mapping[str, ModelPrograms],
    *,
    loaded: Callable[[str, int], None],
    compiled: Callable[[Program], None],
) -> None:
    """Compiles all programs, and meanwhile reads the weights of all models to the device.

    Args:
      plan: where the weights come from.
      programs: from `make_programs`; given their parameters.
      loaded: told the model and the bytes of each parameter as it arrives.
      compiled: told each program as it is ready.

    Raises:
      CheckpointError: a weight that cannot be read; what had begun is waited for.
    """

    def load(name: str) -> None:
        programs[name].set_parameters(load_weights(plan, name, partial(loaded, name)))

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


def _dtype(entry: ModelEntry) -> Dtype:
    """float32 on the CPU unless asked otherwise: as exact as the reference, and at small batches as
    fast; bfloat16 elsewhere.
    """
    if entry.dtype != "auto":
        return entry.dtype
    return "float32" if current_target().platform == "cpu" else "bfloat16"


def _kv_dtype(dtypes: Sequence[str]) -> jnp.dtype:
    """float32 on the CPU, where attention computes in it and where a bfloat16 scatter copies the
    whole pool on JAX 0.10; elsewhere the widest of the models'.
    """
    if current_target().platform == "cpu" or "float32" in dtypes:
        return jnp.dtype("float32")
    return jnp.dtype("bfloat16")


def _default_prefill() -> int:
    """Enough tokens to be bound by compute: on a CPU 128 reach its peak, and hold up decoding for
    a fifth of a second. A TPU v6e or an H200 needs 560 or 200 (FLOP/s over bytes/s); twice as many
    would only hold up decoding longer, and take twice the memory for activations.
    """
    return 128 if current_target().platform == "cpu" else 1024


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


def _spec(entry: ModelEntry, model: LoadedModel, engine: EngineConfig) -> ModelSpec:
    return ModelSpec(
        name=entry.name,
        num_layers=model.config.num_layers,
        tokens_per_page=model.layout.tokens_per_page,
        max_model_len=model.max_model_len,
        limits=BucketLimits(
            max_seqs=-(-engine.max_seqs // model.copies) * model.copies,
            max_prefill_tokens=engine.prefill_tokens or _default_prefill(),
            max_prefill_seqs=min(_PREFILL_SEQS, engine.max_seqs),
            max_decode_tokens=engine.decode_tokens,
        ),
        rate=entry.rate,
        prompt_tokens=entry.prompt_tokens,
        output_tokens=entry.output_tokens,
        kv_floor=entry.kv_floor,
        targets=LatencyTargets(entry.slo.ttft, entry.slo.tpot, entry.slo.scale),
        copies=model.copies,
    )


def _buckets(spec: ModelSpec, copies: int) -> Buckets:
    """Few, as each takes seconds to compile. Of one copy.

    One sequence has a bucket of its own: it is what a quiet server decodes. Eight cost a CPU less
    than twice that. Short prompts have a bucket too: compute is what a prefill takes, padding
    included.
    """
    limits = spec.limits
    max_seqs = limits.max_seqs // copies
    seqs = {1, max_seqs}
    size = 8
    while size < max_seqs:
        seqs.add(size)
        size *= 4
    tokens = {max(16, limits.max_prefill_tokens // 4), limits.max_prefill_tokens}
    return Buckets(
        prefill_tokens=tuple(sorted(tokens)),
        prefill_seqs=limits.max_prefill_seqs,
        decode_seqs=tuple(sorted(seqs)),
        blocks=spec.blocks_for(spec.max_model_len),
    )
