"""From a fleet file to a unit that is ready to run: checkpoints, geometry, weights, programs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

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
from muxjax.models.checkpoint import Checkpoint
from muxjax.models.config import ModelConfig
from muxjax.models.decoder import Decoder
from muxjax.models.demo import cache_folder
from muxjax.models.linear import tiled, tiled_shape
from muxjax.models.loading import open_checkpoint
from muxjax.models.params import param_shapes
from muxjax.models.stacks import Stacks
from muxjax.models.tokenizer import Tokenizer
from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.target import current_target
from muxjax.placement.demand import expected_demand
from muxjax.programs import Buckets, ModelPrograms, Program
from muxjax.scheduling.policies import make_policy
from muxjax.scheduling.pools import pool_of
from muxjax.scheduling.specs import BucketLimits, LatencyTargets, ModelSpec
from muxjax.scheduling.unit import Unit
from muxjax.steps import StepFunctions

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
      dtype: of its matrices.
      param_count: number of parameters.
      param_bytes: bytes of all parameters on the device.
      layout: its geometry in the pool.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer | None
    max_model_len: int
    origin: str
    dtype: Literal["float32", "bfloat16"]
    param_count: int
    param_bytes: int
    layout: KVLayout

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
      kv: the pool's shape `[P, rows, 128]` and type.
      unit: the scheduler's state.
    """

    models: dict[str, LoadedModel]
    checkpoints: dict[str, Checkpoint]
    buckets: dict[str, Buckets]
    functions: dict[str, StepFunctions]
    kv: jax.ShapeDtypeStruct
    unit: Unit

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool."""
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
) -> Plan:
    """Opens the checkpoints and cuts the pool.

    Args:
      config: the fleet file.
      progress: show bars while something is fetched.
      poison: test mode, see `Fleet.load`.
      memory_bytes: free memory of the device; by default the device is asked.

    Raises:
      CheckpointError, DownloadError: a checkpoint that cannot be had.
      PoolTooSmall: the pool cannot hold the fleet.
      FleetConfigError: a length beyond the model's own.
    """
    checkpoints = {
        entry.name: open_checkpoint(entry.source, config_mapping=entry.config, progress=progress)
        for entry in config.models
    }
    dtypes = {entry.name: _dtype(entry) for entry in config.models}
    kv_dtype = _kv_dtype(list(dtypes.values()))
    configs = {name: checkpoint.config for name, checkpoint in checkpoints.items()}
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
    weights = sum(
        _param_bytes(c, dtype) for c, dtype in zip(configs.values(), dtypes.values(), strict=True)
    )
    memory = config.pool.memory or _default_pool(weights, memory_bytes)
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
            config=model,
            tokenizer=checkpoints[name].tokenizer,
            max_model_len=length,
            origin=checkpoints[name].origin,
            dtype=dtypes[name],
            param_count=sum(int(np.prod(s)) for s in param_shapes(model).values()),
            param_bytes=_param_bytes(model, dtypes[name]),
            layout=layout,
        )
        spec = _spec(entry, models[name], config.engine)
        specs.append(spec)
        buckets[name] = _buckets(spec)
        functions[name] = StepFunctions(layout, spec.limits.max_decode_tokens)
    unit = Unit(
        specs,
        num_pages,
        make_policy(config.policy),
        demand=expected_demand,
        kv_quotas=pool_of(config.policy),
        refuse_late=config.refuse_late,
        record_freed=poison,
    )
    kv = jax.ShapeDtypeStruct((num_pages, rows, 128), kv_dtype)
    return Plan(models, checkpoints, buckets, functions, kv, unit)


def make_programs(
    plan: Plan, sharding: jax.sharding.Sharding | None = None
) -> dict[str, ModelPrograms]:
    """The programs of a plan, with parameters that are shapes only: enough to compile.

    Args:
      plan: the unit.
      sharding: of all arguments, for a device that is only described; by default JAX's own.
    """
    programs = {}
    for name, model in plan.models.items():
        stacks = _stacks(model.config)
        shapes = param_shapes(model.config) if stacks is None else stacks.shapes(model.config)
        decoder = Decoder(
            model.config,
            {
                parameter: jax.ShapeDtypeStruct(
                    tiled_shape(shape) if _in_products(model.config, parameter) else shape,
                    _param_dtype(parameter, model.dtype),
                )
                for parameter, shape in shapes.items()
            },
            stacks,
        )
        programs[name] = ModelPrograms(
            name, decoder, plan.functions[name], plan.buckets[name], plan.kv, sharding
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
        model = plan.models[name]
        stacks = _stacks(model.config)
        weights: dict[str, jax.Array] = {}
        for parameter, array in plan.checkpoints[name].weights():
            arrived = _on_device(array, _param_dtype(parameter, model.dtype))
            loaded(name, arrived.nbytes)
            kept, index = (parameter, None) if stacks is None else stacks.place(parameter)
            if stacks is None or index is None:
                weights[kept] = tiled(arrived) if _in_products(model.config, kept) else arrived
                continue
            if kept not in weights:
                weights[kept] = jnp.zeros((stacks.repeats, *arrived.shape), arrived.dtype)
            weights[kept] = _put(weights[kept], arrived, index)
        programs[name].set_parameters(Decoder(model.config, weights, stacks))

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


def _stacks(config: ModelConfig) -> Stacks | None:
    """How the layers of a model are kept on the device that is traced for."""
    return Stacks.of(config) if current_target().platform == "tpu" else None


@partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    """Puts a layer's parameter into its stack, in place."""
    return stack.at[index].set(layer)


def _on_device(array: np.ndarray, dtype: jnp.dtype) -> jax.Array:
    # A copy: JAX may otherwise share memory that a checkpoint still maps or reuses.
    return jnp.array(array.astype(dtype, copy=False), copy=True)


def _in_products(config: ModelConfig, name: str) -> bool:
    """Whether a parameter is multiplied with: an embedding that is no head is only looked up."""
    return name != "embed" or config.tie_embeddings


def _param_dtype(name: str, dtype: str) -> jnp.dtype:
    """Norms and biases stay in float32: they are small, and are added to float32 activations."""
    small = name.endswith(("norm", "bias"))
    return jnp.dtype("float32" if small else dtype)


def _param_bytes(config: ModelConfig, dtype: str) -> int:
    return sum(
        int(np.prod(shape)) * _param_dtype(name, dtype).itemsize
        for name, shape in param_shapes(config).items()
    )


def _dtype(entry: ModelEntry) -> Literal["float32", "bfloat16"]:
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


def _default_pool(weights: int, memory_bytes: int | None) -> int:
    if current_target().platform == "cpu":
        return _CPU_POOL_BYTES
    if memory_bytes is None:
        memory_bytes = _free_memory()
    return max(1, int((memory_bytes - weights) * _ACCELERATOR_POOL_SHARE))


def _free_memory() -> int:
    stats = jax.devices()[0].memory_stats()
    if stats is None or "bytes_limit" not in stats:
        raise FleetConfigError(
            f"pool.memory must be given: the memory of {jax.devices()[0]} is not known"
        )
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _spec(entry: ModelEntry, model: LoadedModel, engine: EngineConfig) -> ModelSpec:
    return ModelSpec(
        name=entry.name,
        num_layers=model.config.num_layers,
        tokens_per_page=model.layout.tokens_per_page,
        max_model_len=model.max_model_len,
        limits=BucketLimits(
            max_seqs=engine.max_seqs,
            max_prefill_tokens=engine.prefill_tokens or _default_prefill(),
            max_prefill_seqs=min(_PREFILL_SEQS, engine.max_seqs),
            max_decode_tokens=engine.decode_tokens,
        ),
        rate=entry.rate,
        prompt_tokens=entry.prompt_tokens,
        output_tokens=entry.output_tokens,
        kv_floor=entry.kv_floor,
        targets=LatencyTargets(entry.slo.ttft, entry.slo.tpot, entry.slo.scale),
    )


def _buckets(spec: ModelSpec) -> Buckets:
    """Few, as each takes seconds to compile.

    One sequence has a bucket of its own: it is what a quiet server decodes. Eight cost a CPU less
    than twice that. Short prompts have a bucket too: compute is what a prefill takes, padding
    included.
    """
    limits = spec.limits
    seqs = {1, limits.max_seqs}
    size = 8
    while size < limits.max_seqs:
        seqs.add(size)
        size *= 4
    tokens = {max(16, limits.max_prefill_tokens // 4), limits.max_prefill_tokens}
    return Buckets(
        prefill_tokens=tuple(sorted(tokens)),
        prefill_seqs=limits.max_prefill_seqs,
        decode_seqs=tuple(sorted(seqs)),
        blocks=spec.blocks_for(spec.max_model_len),
    )
