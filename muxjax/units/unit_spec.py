"""What a unit will hold, worked out from headers alone: no weights, no compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.config.fleet_file import EngineConfig, FleetConfig, ModelEntry
from muxjax.executor.mesh import ModelMesh
from muxjax.executor.programs import Buckets
from muxjax.executor.step_functions import StepFunctions
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import param_shapes
from muxjax.models.nn.shards import Shards
from muxjax.models.nn.weight_format import Dtype, Quantization, stored_bytes
from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.cpu import native
from muxjax.pallas_kernels.target import current_target
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.kv_cache.pool_division import pool_of
from muxjax.scheduling.policies.registry import make_policy
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import BucketLimits, Demand, ModelSpec
from muxjax.units.page_geometry import longest_sequence

_PREFILL_SEQS = 8


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
      replicas: copies of it side by side on the unit's devices.
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
    replicas: int = 1

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
class ModelBuildSpec:
    """One model of a unit.

    Attributes:
      entry: what the fleet file says of it.
      model: as it will be.
      checkpoint: where its weights come from.
      buckets: what is compiled for it.
      functions: its steps, as one device runs them.
      shards: how it is cut.
      mesh: the unit's devices as it uses them.
      spec: the model as the scheduler sees it.
    """

    entry: ModelEntry
    model: LoadedModel
    checkpoint: Checkpoint
    buckets: Buckets
    functions: StepFunctions
    shards: Shards
    mesh: ModelMesh
    spec: ModelSpec

    def expecting(self, entry: ModelEntry) -> ModelBuildSpec:
        """The same model with other expectations, floor and targets."""
        spec = dataclasses.replace(self.spec, **_expectations(entry))
        return dataclasses.replace(self, entry=entry, spec=spec)


@dataclass(frozen=True)
class UnitSpec:
    """What a unit will hold.

    Attributes:
      config: the fleet file, for what all models share.
      devices: the unit's.
      kv: the pool's shape `[P, rows, 128]` and type, on one device.
      parts: its models by name, in the fleet file's order.
      demand: what the models are expected to need.
      poison: test mode, see `Fleet.load`.
    """

    config: FleetConfig
    devices: tuple[jax.Device, ...]
    kv: jax.ShapeDtypeStruct
    parts: dict[str, ModelBuildSpec]
    demand: Callable[[ModelSpec, StepEstimates], Demand]
    poison: bool = False

    @property
    def models(self) -> dict[str, LoadedModel]:
        """As they will be."""
        return {name: part.model for name, part in self.parts.items()}

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool on one device."""
        return int(np.prod(self.kv.shape)) * self.kv.dtype.itemsize

    @property
    def dummy_pages(self) -> int:
        """Pages at the start that padding is written to."""
        return max(part.spec.num_layers for part in self.parts.values())

    def having(self, part: ModelBuildSpec) -> Self:
        """The plan with one more model, or with another in the place of the one of its name."""
        return dataclasses.replace(self, parts={**self.parts, part.model.name: part})

    def without(self, name: str) -> Self:
        """The plan with one model fewer."""
        rest = {other: part for other, part in self.parts.items() if other != name}
        return dataclasses.replace(self, parts=rest)

    def make_unit(self, asleep: Collection[str] = ()) -> Scheduler:
        """Makes the scheduler's state, without any request.

        Args:
          asleep: models that the pool is cut for, and that have no part of it for now.

        Raises:
          PoolTooSmall: the pool cannot hold one request of full length of each model.
        """
        unit = Scheduler(
            [part.spec for part in self.parts.values()],
            self.kv.shape[0],
            make_policy(self.config.policy),
            demand=self.demand,
            kv_quotas=pool_of(self.config.policy),
            refuse_late=self.config.refuse_late,
            prefix_cache=self.config.pool.prefix_cache,
            record_freed=self.poison,
        )
        for name in asleep:
            unit.remove_model(name)
        return unit


def spec_model(
    entry: ModelEntry,
    checkpoint: Checkpoint,
    mesh: ModelMesh,
    kv: jax.ShapeDtypeStruct,
    engine: EngineConfig,
    *,
    free_pages: int,
    available: float,
) -> ModelBuildSpec:
    """One model on a pool.

    Args:
      entry: what the fleet file says of it.
      checkpoint: opened.
      mesh: the unit's devices as it uses them.
      kv: the pool on one device.
      engine: sizes of the steps.
      free_pages: of the pool, without the dummy block.
      available: the part of the pool, 0 to 1, that is not guaranteed to other models.

    Raises:
      FleetConfigError: a length beyond the model's own.
    """
    shards, name = Shards(checkpoint.config, mesh.tp_size), entry.name
    local, rows = shards.local, kv.shape[1]
    layout = KVLayout(rows, local.num_kv_heads, local.head_dim)
    entry.check_length(local.max_position)
    length = entry.max_model_len or longest_sequence(
        local.max_position, layout, local.num_layers, free_pages, available
    )
    dtype = dtype_of(entry)
    model = LoadedModel(
        name=name,
        config=shards.config,
        tokenizer=checkpoint.tokenizer,
        max_model_len=length,
        origin=checkpoint.origin,
        dtype=dtype,
        quantization=entry.quantization,
        param_count=sum(int(np.prod(shape)) for shape in param_shapes(shards.config).values()),
        param_bytes=stored_bytes(local, dtype, entry.quantization),
        layout=layout,
        tensor_parallel=mesh.tp_size,
        replicas=mesh.replicas,
    )
    spec = _spec(entry, model, engine)
    return ModelBuildSpec(
        entry=entry,
        model=model,
        checkpoint=checkpoint,
        buckets=_buckets(spec, mesh.replicas),
        functions=StepFunctions(layout, spec.limits.max_decode_tokens),
        shards=shards,
        mesh=mesh,
        spec=spec,
    )


def dtype_of(entry: ModelEntry) -> Dtype:
    """float32 on the CPU unless asked otherwise: as exact as the reference, and at small batches as
    fast; bfloat16 elsewhere. Of an int8 model only keys and values have it, and are bfloat16.
    """
    if entry.dtype != "auto":
        return entry.dtype
    whole = current_target().platform == "cpu" and entry.quantization == "none"
    return "float32" if whole else "bfloat16"


def kv_dtype(dtypes: Sequence[str]) -> jnp.dtype:
    """The widest of the models'; on a CPU whose pool cannot be bfloat16, float32."""
    if "float32" in dtypes or (
        current_target().platform == "cpu" and not native.prefers_bfloat16_pool()
    ):
        return jnp.dtype("float32")
    return jnp.dtype("bfloat16")


def _default_prefill() -> int:
    """Enough tokens to be bound by compute: on a CPU 128 reach its peak, and hold up decoding for
    a fifth of a second. A TPU v6e or an H200 needs 560 or 200 (FLOP/s over bytes/s); twice as many
    would only hold up decoding longer, and take twice the memory for activations.
    """
    return 128 if current_target().platform == "cpu" else 1024


def _spec(entry: ModelEntry, model: LoadedModel, engine: EngineConfig) -> ModelSpec:
    return ModelSpec(
        name=entry.name,
        num_layers=model.config.num_layers,
        tokens_per_page=model.layout.tokens_per_page,
        max_model_len=model.max_model_len,
        limits=BucketLimits(
            max_seqs=-(-engine.max_seqs // model.replicas) * model.replicas,
            max_prefill_tokens=engine.prefill_tokens or _default_prefill(),
            max_prefill_seqs=min(_PREFILL_SEQS, engine.max_seqs),
            max_decode_tokens=engine.decode_tokens,
        ),
        replicas=model.replicas,
        **_expectations(entry),
    )


def _expectations(entry: ModelEntry) -> dict[str, Any]:
    """What of a model's spec may change while it is served."""
    return {
        "load": entry.expected_load,
        "kv_floor": entry.kv_floor,
        "targets": entry.slo.latency_slo,
    }


def _buckets(spec: ModelSpec, replicas: int) -> Buckets:
    """Few, as each takes seconds to compile. Of one copy.

    One sequence has a bucket of its own: it is what a quiet server decodes. Eight cost a CPU less
    than twice that. Short prompts have a bucket too: compute is what a prefill takes, padding
    included.
    """
    limits = spec.limits
    max_seqs = limits.max_seqs // replicas
    seqs = {1, max_seqs}
    size = 8
    while size < max_seqs:
        seqs.add(size)
        size *= 4
    tokens = {limits.part_prefill_tokens, limits.max_prefill_tokens}
    return Buckets(
        prefill_tokens=tuple(sorted(tokens)),
        prefill_seqs=limits.max_prefill_seqs,
        decode_seqs=tuple(sorted(seqs)),
        blocks=spec.blocks_for(spec.max_model_len),
    )
