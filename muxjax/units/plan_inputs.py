"""Reads the inputs of planning from a fleet file: loads, cluster, costs. Imports no JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from muxjax.config.fleet_file import FleetConfig
from muxjax.config.model_entry import ModelEntry
from muxjax.errors import FleetConfigError, PlanError
from muxjax.models.checkpoints.config_only import read_shape
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import param_shapes
from muxjax.placement.costs.cluster import Cluster, parse_cluster
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.model_shape import ModelShape
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import Execution

DEFAULT_CLUSTER = "1x1:cpu"
"""This machine, used if neither the fleet file nor the command line names a cluster."""


@dataclass(frozen=True)
class PlanInputs:
    """The inputs of `placement.planner.planner.plan_placement`.

    Attributes:
      loads: the models and their expected load.
      cluster: nodes and devices.
      costs: for each group of its nodes.
      profile: path of the profile with the costs; None for calculated costs.
      execution: concurrent for a profile with shares of compute, else time-sliced.
    """

    loads: tuple[ModelLoad, ...]
    cluster: Cluster
    costs: tuple[PlanningCosts, ...]
    profile: str | None
    execution: Execution


def plan_inputs(
    config: FleetConfig, *, cluster: str | None = None, profile: Path | None = None
) -> PlanInputs:
    """Reads the models' shapes, from their configs only, and creates the cost models.

    Args:
      config: the fleet file.
      cluster: replaces the fleet file's.
      profile: path of measured step times; without it, costs are calculated.

    Raises:
      CheckpointError, DownloadError: a model's config cannot be read.
      FleetConfigError: a `max_model_len` is beyond the model's context length, or models of the
        same profile have different sizes.
      PlanError: a device is unknown, or a model is not in the profile.
      ProfileError: the profile cannot be used.
    """
    parsed_cluster = parse_cluster(cluster or config.cluster or DEFAULT_CLUSTER)
    on_cpu = all(group.device.name == "cpu" for group in parsed_cluster.groups)
    kinds = {entry.name: entry.profile or entry.name for entry in config.models}
    shapes: dict[str, ModelShape] = {}
    for entry in config.models:
        kind = kinds[entry.name] if profile is not None else entry.name
        shape = _shape(entry, on_cpu)
        if shapes.setdefault(kind, shape) != shape:
            raise FleetConfigError(
                f"{entry.name} and another model with the profile {kind} have different sizes"
            )
    costs: Sequence[PlanningCosts]
    execution: Execution = "time_sliced"
    if profile is None:
        costs = [Roofline(shapes, group.device) for group in parsed_cluster.groups]
    else:
        table = ProfileTable(profile, shapes)
        for name, kind in kinds.items():
            if kind not in table.models:
                raise PlanError(
                    f"{name}: the profile {profile} has no model {kind}; it has "
                    f"{', '.join(table.raw)}: set its `profile:` to one of them, or measure it"
                )
        costs = [table] * len(parsed_cluster.groups)
        if any(
            len(table.shares(kind, tp)) > 1
            for kind in kinds.values()
            for tp in table.tp_sizes(kind)
        ):
            execution = "concurrent"
    # Only an explicit `max_seqs` limits the planner: the engine's default is not a requirement.
    max_batch = config.engine.max_seqs if "max_seqs" in config.engine.model_fields_set else None
    loads = []
    for entry in config.models:
        kind = kinds[entry.name] if profile is not None else entry.name
        entry.check_length(shapes[kind].max_position)
        loads.append(_model_load(entry, kind, max_batch))
    return PlanInputs(
        loads=tuple(loads),
        cluster=parsed_cluster,
        costs=tuple(costs),
        profile=None if profile is None else str(profile),
        execution=execution,
    )


def _model_load(entry: ModelEntry, kind: str, max_batch: int | None) -> ModelLoad:
    return ModelLoad(
        name=entry.name,
        kind=kind,
        expected=entry.expected_load,
        slo=entry.slo.latency_slo,
        kv_floor=entry.kv_floor,
        max_batch=max_batch,
        # The engine refuses a pool that cannot hold this length. Without one, it chooses a length
        # that fits the pool (`page_geometry.default_max_model_len`).
        longest=entry.max_model_len,
    )


def _shape(entry: ModelEntry, on_cpu: bool) -> ModelShape:
    """Returns a model's shape with the types that the engine will use.

    The rules are the same as in `build_model_spec.resolve_dtype` and `pool_dtype`, without JAX.
    """
    shape = read_shape(entry.source, entry.config)
    wide = entry.dtype == "float32" or (entry.dtype == "auto" and on_cpu)
    bits = 32.0 if wide else 16.0
    int8 = entry.quantization == "int8"
    # The default for the keys and values of an int8 model on a CPU is bfloat16.
    wide_kv = entry.dtype == "float32" if int8 else wide
    wide_kv = wide_kv or (on_cpu and not _cpu_prefers_bfloat16_pool())
    return model_shape(
        shape.config,
        weight_bits=8.0 if int8 else shape.weight_bits or bits,
        embed_bits=8.0 if int8 else bits,
        kv_bits=32.0 if wide_kv else 16.0,
    )


def _cpu_prefers_bfloat16_pool() -> bool:
    # Imports JAX, so only for a CPU: planning for other hardware needs no JAX.
    from muxjax.pallas_kernels.cpu import native

    return native.prefers_bfloat16_pool()


def model_shape(
    config: ModelConfig, *, weight_bits: float, embed_bits: float, kv_bits: float
) -> ModelShape:
    """Returns the sizes of a model that planning needs; bits per element of each kind of array."""
    return ModelShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        tie_embeddings=config.tie_embeddings,
        weight_bits=weight_bits,
        embed_bits=embed_bits,
        kv_bits=kv_bits,
        small_params=sum(
            math.prod(shape) for shape in param_shapes(config).values() if len(shape) == 1
        ),
        max_position=config.max_position,
    )
