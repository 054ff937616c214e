"""Builds the spec of one model on a pool: types, lengths, buckets."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.config.fleet_file import EngineConfig
from muxjax.config.model_entry import ModelEntry
from muxjax.engine.loaded_model import LoadedModel
from muxjax.executor.mesh import ModelMesh
from muxjax.executor.programs import Buckets
from muxjax.executor.step_functions import StepFunctions
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.nn.params import param_shapes
from muxjax.models.nn.shards import Shards
from muxjax.models.nn.weight_format import Dtype, stored_bytes
from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.cpu import native
from muxjax.pallas_kernels.target import current_target
from muxjax.scheduling.specs import BucketLimits, ModelSpec
from muxjax.units.page_geometry import default_max_model_len
from muxjax.units.unit_spec import ModelBuildSpec, expectations

_MAX_PREFILL_SEQS = 8


def build_model_spec(
    entry: ModelEntry,
    checkpoint: Checkpoint,
    mesh: ModelMesh,
    kv: jax.ShapeDtypeStruct,
    engine: EngineConfig,
    *,
    free_pages: int,
    available: float,
) -> ModelBuildSpec:
    """Returns the spec of one model on a pool.

    Args:
      entry: of the fleet file.
      checkpoint: opened.
      mesh: the unit's devices, as the model uses them.
      kv: shape and type of the pool on one device.
      engine: sizes of the steps.
      free_pages: number of pages of the pool without the dummy block.
      available: the fraction of the pool, 0 to 1, that is not guaranteed to other models.

    Raises:
      FleetConfigError: `max_model_len` is beyond the model's context length.
    """
    shards = Shards(checkpoint.config, mesh.tp_size)
    local = shards.local
    layout = KVLayout(kv.shape[1], local.num_kv_heads, local.head_dim)
    entry.check_length(local.max_position)
    max_model_len = entry.max_model_len or default_max_model_len(
        local.max_position, layout, local.num_layers, free_pages, available
    )
    dtype = resolve_dtype(entry)
    model = LoadedModel(
        name=entry.name,
        config=shards.config,
        tokenizer=checkpoint.tokenizer,
        max_model_len=max_model_len,
        origin=checkpoint.origin,
        dtype=dtype,
        quantization=entry.quantization,
        param_count=sum(int(np.prod(shape)) for shape in param_shapes(shards.config).values()),
        param_bytes=stored_bytes(local, dtype, entry.quantization),
        layout=layout,
        tensor_parallel=mesh.tp_size,
        replicas=mesh.replicas,
    )
    spec = _scheduler_spec(entry, model, engine)
    return ModelBuildSpec(
        entry=entry,
        model=model,
        checkpoint=checkpoint,
        buckets=_choose_buckets(spec, mesh.replicas),
        functions=StepFunctions(layout, spec.limits.max_decode_tokens),
        shards=shards,
        mesh=mesh,
        spec=spec,
    )


def resolve_dtype(entry: ModelEntry) -> Dtype:
    """Returns the type that a model is served in.

    `auto` is float32 for an unquantized model on a CPU, and bfloat16 otherwise. On a CPU, float32
    is not slower at small batches. An int8 model uses this type only for keys, values and vectors.
    """
    if entry.dtype != "auto":
        return entry.dtype
    full_precision = current_target().platform == "cpu" and entry.quantization == "none"
    return "float32" if full_precision else "bfloat16"


def pool_dtype(dtypes: Sequence[str]) -> jnp.dtype:
    """Returns the pool's type: the widest type of the models.

    It is float32 on a CPU whose kernels cannot read a bfloat16 pool.
    """
    if "float32" in dtypes or (
        current_target().platform == "cpu" and not native.prefers_bfloat16_pool()
    ):
        return jnp.dtype("float32")
    return jnp.dtype("bfloat16")


def _default_prefill_tokens() -> int:
    """Returns a number of tokens at which a prefill is compute-bound.

    A larger prefill is not faster per token. It delays decoding and needs more memory for
    activations.
    """
    return 128 if current_target().platform == "cpu" else 1024


def _scheduler_spec(entry: ModelEntry, model: LoadedModel, engine: EngineConfig) -> ModelSpec:
    return ModelSpec(
        name=entry.name,
        num_layers=model.config.num_layers,
        tokens_per_page=model.layout.tokens_per_page,
        max_model_len=model.max_model_len,
        limits=BucketLimits(
            max_seqs=-(-engine.max_seqs // model.replicas) * model.replicas,
            max_prefill_tokens=engine.prefill_tokens or _default_prefill_tokens(),
            max_prefill_seqs=min(_MAX_PREFILL_SEQS, engine.max_seqs),
            max_decode_tokens=engine.decode_tokens,
        ),
        replicas=model.replicas,
        **expectations(entry),
    )


def _choose_buckets(spec: ModelSpec, replicas: int) -> Buckets:
    """Returns the buckets of one replica: few, because each takes seconds to compile.

    The decode buckets are 1 (the usual batch at low load), 8, 32, ... up to the maximum. Short
    prompts have a separate prefill bucket, because padding costs as much as tokens.
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
