"""Builds simulated units from a plan, for a policy.

The pool of a unit is divided as in the engine: a page has an integer number of tokens of every
model, and a block of a model with `L` layers has `L` pages. Replicas of a model on one mesh share
the batch evenly. The KV of a token is only on the devices of one replica, so each device stores
`1 / replicas` of it on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from muxjax.errors import PlanError, PoolTooSmall
from muxjax.placement.costs.cost_model import CostModel
from muxjax.placement.costs.model_shape import ModelShape
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.step_times import StepTimes
from muxjax.placement.planner.plan import Execution, PlannedModel, PlannedUnit
from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.placement.simulator.concurrent import create_concurrent_policy
from muxjax.placement.simulator.metrics import AttainmentCriterion
from muxjax.placement.simulator.simulated_executor import SimulatedExecutor, SimulatedModel
from muxjax.placement.simulator.simulator import UnitSimulation
from muxjax.scheduling.demand import expected_demand
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.policies.interface import Policy
from muxjax.scheduling.policies.registry import (
    PolicyEntry,
    create_policy,
    get_policy,
    policy_names,
)
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import BucketLimits, Demand, ModelSpec

type PolicyName = str
"""One of `simulated_policy_names`. A policy without a concurrent variant is always time-sliced."""

PAGE_TOKENS = 16
"""Tokens per page of the widest model of a unit; pages of narrower models have more tokens."""
MAX_BLOCKS = 2**16
"""Maximum number of blocks in a pool. Millions of blocks, of small models on large devices, would
take long to set up, so their pages are larger."""
EVEN_COMPUTE = 0.2
"""Fraction of the compute that policies with exclusive shares divide evenly, independent of
demand."""
MAX_REQUEST_TOKENS = 8192
"""Maximum tokens of a request if the fleet file sets no limit, as in the engine. A shorter context
length of the model limits it further."""


@dataclass(frozen=True)
class StepSizes:
    """Limits of the steps of every model.

    Attributes:
      prefill_tokens: maximum tokens of a prefill step.
      prefill_seqs: maximum prompts of a prefill step.
      decode_tokens: maximum tokens per sequence of a decode step.
    """

    prefill_tokens: int = 2048
    prefill_seqs: int = 64
    decode_tokens: int = 8


@dataclass(frozen=True)
class SystemConfig:
    """Configuration of simulated units beyond the plan.

    Attributes:
      policy: the scheduling policy.
      execution: time-sliced or concurrent execution.
      steps: limits of the steps. In concurrent execution a decode step generates one token per
        sequence, as in MuxServe, to use free compute shares at once.
      blocks: maximum number of blocks in a pool. Fewer blocks have larger pages and a faster setup.
    """

    policy: PolicyName = "adbs"
    execution: Execution = "time_sliced"
    steps: StepSizes = StepSizes()
    blocks: int = MAX_BLOCKS

    @property
    def effective_execution(self) -> Execution:
        """The execution mode under this policy."""
        return self.execution if self.entry.concurrent is not None else "time_sliced"

    @property
    def entry(self) -> PolicyEntry:
        """The registered policy. `spatial` uses `adbs` with one model on each unit."""
        return get_policy("adbs" if self.policy == "spatial" else self.policy)


def build_simulated_unit(
    planned: PlannedUnit,
    system: SystemConfig,
    costs: CostModel,
    shapes: Mapping[str, ModelShape],
    *,
    bandwidth: float | None,
    criteria: Mapping[str, AttainmentCriterion] | None = None,
) -> UnitSimulation:
    """Builds one unit of a plan.

    Args:
      planned: the unit.
      system: policy, execution and step limits.
      costs: durations of steps.
      shapes: shape of each kind of model.
      bandwidth: bytes per second of one device's memory, for concurrent execution.
      criteria: attainment criteria by model, which define the SLOs of the scheduler; None: the
        scheduler's defaults.

    Raises:
      PlanError: the pool does not fit a request of full length; the message names the model and
        possible remedies.
    """
    execution = system.effective_execution
    steps = system.steps
    if execution == "concurrent":
        steps = replace(steps, decode_tokens=1)
    variant = system.entry.concurrent if execution == "concurrent" else None
    if variant is not None and variant.exclusive_shares:
        planned = _partition_compute(planned)
    page_bytes, specs = _model_specs(planned, costs, shapes, steps, system.blocks)
    if criteria is not None:
        specs = [
            replace(spec, targets=criteria[spec.name].scheduler_slo(spec.load, costs))
            for spec in specs
        ]
    simulated = {model.name: _simulated_model(model, execution, costs) for model in planned.models}
    compute = _compute_shares(planned) if execution == "concurrent" else None
    executor = SimulatedExecutor(simulated, costs, execution, bandwidth=bandwidth, compute=compute)
    kv_quotas = system.entry.kv_quotas
    if variant is not None and variant.kv_quotas is not None:
        kv_quotas = variant.kv_quotas
    estimates = _initial_estimates(specs, simulated, costs)
    quotas = {model.name: model.kv_quota for model in planned.models}

    def demand(specs: Sequence[ModelSpec], current: StepEstimates) -> dict[str, Demand]:
        expected = expected_demand(specs, current)
        if not all(quotas.values()):
            return expected
        # Planned quotas include the floors, which the rates alone do not.
        return {name: replace(demand, kv=quotas[name]) for name, demand in expected.items()}

    try:
        scheduler = Scheduler(
            specs,
            int(planned.kv_bytes // page_bytes),
            _build_policy(system, compute),
            demand=demand,
            estimates=estimates,
            kv_quotas=kv_quotas,
            concurrent=execution == "concurrent",
        )
    except PoolTooSmall as error:
        raise PlanError(
            f"unit {planned.name} ({planned.size} x {planned.device}, with a KV pool of "
            f"{planned.kv_bytes / 1e9:.3g} GB each): {error}; or place fewer models on it, or use "
            f"more devices"
        ) from error
    return UnitSimulation(planned.name, scheduler, executor, planned.planned_load)


def simulated_policy_names() -> tuple[str, ...]:
    """Names of the registered policies, and `spatial`: separate devices for each model."""
    return (*policy_names(), "spatial")


def longest_request(model: PlannedModel, shape: ModelShape) -> int:
    """Tokens of the longest request of a model, prompt and output."""
    return min(shape.max_position, model.longest or MAX_REQUEST_TOKENS)


def _build_policy(system: SystemConfig, compute: ComputeShares | None) -> Policy:
    name = system.entry.name
    return create_policy(name) if compute is None else create_concurrent_policy(name, compute)


def _compute_shares(planned: PlannedUnit) -> ComputeShares:
    shares: dict[tuple[str, Literal["prefill", "decode"]], float] = {}
    for model in planned.models:
        shares[model.name, "prefill"] = model.prefill_share
        shares[model.name, "decode"] = model.decode_share
    return ComputeShares(shares)


def _partition_compute(planned: PlannedUnit) -> PlannedUnit:
    """A copy of the unit with exclusive compute shares by demand, and an even minimum.

    The demand is the time of a model's steps times their planned compute share.
    """
    demands = [
        max(1e-9, m.prefill_time * m.prefill_share + m.decode_time * m.decode_share)
        for m in planned.models
    ]
    even = EVEN_COMPUTE / len(demands)
    total = sum(demands)
    models = []
    for model, demand in zip(planned.models, demands, strict=True):
        share = min(1.0, even + (1 - EVEN_COMPUTE) * (demand / total))
        models.append(model.model_copy(update={"prefill_share": share, "decode_share": share}))
    return planned.model_copy(update={"models": tuple(models)})


def _model_specs(
    planned: PlannedUnit,
    costs: CostModel,
    shapes: Mapping[str, ModelShape],
    steps: StepSizes,
    max_blocks: int,
) -> tuple[float, list[ModelSpec]]:
    """Bytes of a page on a device, and the scheduler's model specs."""
    token_bytes = {
        model.name: costs.kv_bytes_per_token(model.kind, tp=model.tp)
        / model.replicas
        / shapes[model.kind].num_layers
        for model in planned.models
    }
    shallowest = min(shapes[model.kind].num_layers for model in planned.models)
    page_bytes = max(
        PAGE_TOKENS * max(token_bytes.values()), planned.kv_bytes / (max_blocks * shallowest)
    )
    floors = all(model.kv_floor > 0 for model in planned.models)
    specs = []
    for model in planned.models:
        shape = shapes[model.kind]
        times = _measured_times(model, costs)
        limits = BucketLimits(
            max_seqs=min(model.max_batch, max(times.decode)) if times else model.max_batch,
            max_prefill_tokens=max(times.prefill) if times else steps.prefill_tokens,
            max_prefill_seqs=steps.prefill_seqs,
            max_decode_tokens=steps.decode_tokens,
        )
        specs.append(
            ModelSpec(
                model.name,
                shape.num_layers,
                int(page_bytes // token_bytes[model.name]),
                longest_request(model, shape),
                limits,
                model.expected_load,
                model.kv_floor if floors else None,
            )
        )
    return page_bytes, specs


def _measured_times(model: PlannedModel, costs: CostModel) -> StepTimes | None:
    """Measured times of the engine's steps, which are available for one device only."""
    if model.tp == model.replicas == 1 and isinstance(costs, ProfileTable):
        return costs.step_times.get(model.kind)
    return None


def _simulated_model(model: PlannedModel, execution: Execution, costs: CostModel) -> SimulatedModel:
    time_sliced = execution == "time_sliced"
    return SimulatedModel(
        model.kind,
        model.tp,
        model.replicas,
        1.0 if time_sliced else model.prefill_share,
        1.0 if time_sliced else model.decode_share,
        model.max_batch,
        _measured_times(model, costs) if time_sliced else None,
    )


def _initial_estimates(
    specs: Sequence[ModelSpec], simulated: Mapping[str, SimulatedModel], costs: CostModel
) -> StepEstimates:
    """The scheduler's initial estimates of step times, from the cost model."""
    estimates = StepEstimates([spec.name for spec in specs])
    for spec in specs:
        model = simulated[spec.name]
        length = max(1.0, spec.load.prompt_tokens)
        context = spec.load.decode_context
        for size in _powers_of_two(spec.limits.max_prefill_tokens):
            tokens = size / model.replicas
            seconds = costs.prefill_seconds(
                model.kind, tokens, min(length, tokens), tp=model.tp, share=model.prefill_share
            )
            estimates.observe_prefill(spec.name, size, seconds)
        for size in _powers_of_two(spec.limits.max_seqs):
            batch = max(1.0, size / model.replicas)
            seconds = costs.decode_seconds(
                model.kind, batch, context, tp=model.tp, share=model.decode_share
            )
            estimates.observe_decode(spec.name, size, 1, seconds)
    return estimates


def _powers_of_two(limit: int) -> list[int]:
    return [2**exponent for exponent in range(limit.bit_length())]
