"""From a plan to units that can be simulated, under a policy.

A unit's pool is cut as the engine cuts it: pages that hold a whole number of tokens of every model,
of which a model with `L` layers takes `L` at a time. Replicas of a model on one mesh share its
batch evenly. A token's KV is on the devices of its replica only, so each device holds the fraction
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
from muxjax.placement.simulator.metrics import AttainmentTarget
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
"""One of `simulated_policy_names`. A policy without a concurrent variant runs one program at a time
whatever the execution."""

PAGE_TOKENS = 16
"""Tokens of the widest model of a unit in a page; narrower ones have more."""
MOST_BLOCKS = 2**16
"""Blocks in a pool. Toy models on large devices would have millions, which take long to set up and
which nobody needs; their pages are larger instead."""
LEAST_PART = 0.2
"""Of the compute, divided evenly among such parts whatever the need."""
LONGEST = 8192
"""The longest request where the fleet does not say and the model's own context is longer, as in the
engine."""


@dataclass(frozen=True)
class StepSizes:
    """The largest steps of every model.

    Attributes:
      prefill_tokens: tokens of a prefill step.
      prefill_seqs: prompts in it.
      decode_tokens: tokens that a decode step makes for a sequence.
    """

    prefill_tokens: int = 2048
    prefill_seqs: int = 64
    decode_tokens: int = 8


@dataclass(frozen=True)
class System:
    """How units are run: all that is not in the plan.

    Attributes:
      policy: what picks the steps.
      execution: one program at a time, or side by side.
      steps: their sizes. Where programs run side by side a decode step makes one token, as in
        MuxServe, so that a free share of the chip is seen at once.
      blocks: the most of them in a pool; fewer are set up sooner, with larger pages.
    """

    policy: PolicyName = "adbs"
    execution: Execution = "time_sliced"
    steps: StepSizes = StepSizes()
    blocks: int = MOST_BLOCKS

    @property
    def runs(self) -> Execution:
        """How programs run in fact."""
        return self.execution if self.entry.concurrent is not None else "time_sliced"

    @property
    def entry(self) -> PolicyEntry:
        """The policy in the registry: that of `spatial` is `adbs`, with one model on each unit."""
        return get_policy("adbs" if self.policy == "spatial" else self.policy)


def build_simulated_unit(
    planned: PlannedUnit,
    system: System,
    costs: CostModel,
    shapes: Mapping[str, ModelShape],
    *,
    bandwidth: float | None,
    targets: Mapping[str, AttainmentTarget] | None = None,
) -> UnitSimulation:
    """One unit of a plan.

    Args:
      planned: the unit.
      system: how it is run.
      costs: how long its steps take.
      shapes: of each kind of model.
      bandwidth: bytes a second of one device's memory; for programs side by side.
      targets: of each model, for the policies that count with them; by default the scheduler's own.

    Raises:
      PlanError: the pool does not hold a request of full length; says of which model, and what
        would make it fit.
    """
    execution = system.runs
    steps = system.steps
    if execution == "concurrent":
        steps = replace(steps, decode_tokens=1)
    variant = system.entry.concurrent if execution == "concurrent" else None
    if variant is not None and variant.exclusive_shares:
        planned = _in_parts(planned)
    page_bytes, specs = _specs(planned, costs, shapes, steps, system.blocks)
    if targets is not None:
        specs = [
            replace(
                spec,
                targets=targets[spec.name].for_scheduler(
                    spec.prompt_tokens, spec.output_tokens, costs
                ),
            )
            for spec in specs
        ]
    simulated = {model.name: _simulated(model, execution, costs) for model in planned.models}
    compute = _compute(planned) if execution == "concurrent" else None
    executor = SimulatedExecutor(simulated, costs, execution, bandwidth=bandwidth, compute=compute)
    kv_quotas = system.entry.kv_quotas
    if variant is not None and variant.kv_quotas is not None:
        kv_quotas = variant.kv_quotas
    estimates = _estimates(specs, simulated, costs)
    quotas = {model.name: model.kv_quota for model in planned.models}

    def demand(spec: ModelSpec, current: StepEstimates) -> Demand:
        found = expected_demand(spec, current)
        # The plan's quotas say the need of pages better than the rates alone, where it has them.
        return replace(found, kv=quotas[spec.name]) if all(quotas.values()) else found

    try:
        unit = Scheduler(
            specs,
            int(planned.kv_bytes // page_bytes),
            _policy(system, compute),
            demand=demand,
            estimates=estimates,
            kv_quotas=kv_quotas,
            concurrent=execution == "concurrent",
        )
    except PoolTooSmall as error:
        raise PlanError(
            f"unit {planned.name} ({planned.size} x {planned.device}): {error}; or place fewer "
            f"models on it, or on more devices: {planned.kv_bytes / 1e9:.3g} GB of each are left "
            f"for keys and values"
        ) from error
    return UnitSimulation(planned.name, unit, executor, planned.token_seconds)


def simulated_policy_names() -> tuple[str, ...]:
    """The registered policies, and `spatial`: each model on its own devices."""
    return (*policy_names(), "spatial")


def longest_request(model: PlannedModel, shape: ModelShape) -> int:
    """Tokens of the longest request of a model, prompt and output."""
    return min(shape.max_position, model.longest or LONGEST)


def _policy(system: System, compute: ComputeShares | None) -> Policy:
    name = system.entry.name
    return create_policy(name) if compute is None else create_concurrent_policy(name, compute)


def _compute(planned: PlannedUnit) -> ComputeShares:
    shares: dict[tuple[str, Literal["prefill", "decode"]], float] = {}
    for model in planned.models:
        shares[model.name, "prefill"] = model.prefill_share
        shares[model.name, "decode"] = model.decode_share
    return ComputeShares(shares)


def _in_parts(planned: PlannedUnit) -> PlannedUnit:
    """The unit with compute shares that are the models' alone, by their need of the compute: of the
    time that their steps take, the part of the chip that the plan gives them for it.
    """
    needs = [
        max(1e-9, m.prefill_time * m.prefill_share + m.decode_time * m.decode_share)
        for m in planned.models
    ]
    least = LEAST_PART / len(needs)
    total = sum(needs)
    models = []
    for model, need in zip(planned.models, needs, strict=True):
        part = min(1.0, least + (1 - LEAST_PART) * (need / total))
        models.append(model.model_copy(update={"prefill_share": part, "decode_share": part}))
    return planned.model_copy(update={"models": tuple(models)})


def _specs(
    planned: PlannedUnit,
    costs: CostModel,
    shapes: Mapping[str, ModelShape],
    steps: StepSizes,
    most_blocks: int,
) -> tuple[float, list[ModelSpec]]:
    """Bytes of a page on a device, and the models as the scheduler sees them."""
    token_bytes = {
        model.name: costs.kv_bytes_per_token(model.kind, tp=model.tp)
        / model.replicas
        / shapes[model.kind].num_layers
        for model in planned.models
    }
    shallowest = min(shapes[model.kind].num_layers for model in planned.models)
    page_bytes = max(
        PAGE_TOKENS * max(token_bytes.values()), planned.kv_bytes / (most_blocks * shallowest)
    )
    floors = all(model.kv_floor > 0 for model in planned.models)
    specs = []
    for model in planned.models:
        shape = shapes[model.kind]
        times = _times(model, costs)
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
                model.rate,
                model.prompt_tokens,
                model.output_tokens,
                model.kv_floor if floors else None,
            )
        )
    return page_bytes, specs


def _times(model: PlannedModel, costs: CostModel) -> StepTimes | None:
    """The engine's own steps, where they were measured: on one device."""
    if model.tp == model.replicas == 1 and isinstance(costs, ProfileTable):
        return costs.step_times.get(model.kind)
    return None


def _simulated(model: PlannedModel, execution: Execution, costs: CostModel) -> SimulatedModel:
    sliced = execution == "time_sliced"
    return SimulatedModel(
        model.kind,
        model.tp,
        model.replicas,
        1.0 if sliced else model.prefill_share,
        1.0 if sliced else model.decode_share,
        model.max_batch,
        _times(model, costs) if sliced else None,
    )


def _estimates(
    specs: Sequence[ModelSpec], simulated: Mapping[str, SimulatedModel], costs: CostModel
) -> StepEstimates:
    """Step times that the scheduler begins with: the plan knows the cost model."""
    estimates = StepEstimates([spec.name for spec in specs])
    for spec in specs:
        model = simulated[spec.name]
        length = max(1.0, spec.prompt_tokens)
        context = spec.prompt_tokens + spec.output_tokens / 2
        for size in _powers(spec.limits.max_prefill_tokens):
            tokens = size / model.replicas
            seconds = costs.prefill_seconds(
                model.kind, tokens, min(length, tokens), tp=model.tp, share=model.prefill_share
            )
            estimates.observe_prefill(spec.name, size, seconds)
        for size in _powers(spec.limits.max_seqs):
            batch = max(1.0, size / model.replicas)
            seconds = costs.decode_seconds(
                model.kind, batch, context, tp=model.tp, share=model.decode_share
            )
            estimates.observe_decode(spec.name, size, 1, seconds)
    return estimates


def _powers(most: int) -> list[int]:
    return [2**exponent for exponent in range(most.bit_length())]
