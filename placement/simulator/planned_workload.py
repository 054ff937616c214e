"""The expected workload of a plan: rates and lengths of its models."""

from __future__ import annotations

from collections.abc import Sequence

from muxjax.placement.costs.model_shape import ModelShape
from muxjax.placement.planner.plan import PlacementPlan, PlannedModel
from muxjax.placement.simulator.simulated_units import longest_request
from muxjax.placement.workload.arrivals import power_law_rates
from muxjax.placement.workload.lengths import Lengths, LogNormal, Sampled
from muxjax.placement.workload.synthetic import Traffic


def planned_rates(plan: PlacementPlan) -> dict[str, float]:
    """Requests per second of each model, on all of its units."""
    rates: dict[str, float] = {}
    for unit in plan.units:
        for model in unit.models:
            rates[model.name] = rates.get(model.name, 0.0) + model.rate
    return rates


def planned_traffic(
    plan: PlacementPlan,
    *,
    alpha: float | None = None,
    rate: float | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> list[Traffic]:
    """Builds the traffic of all models of a plan.

    Args:
      plan: the plan.
      alpha: exponent of a power law that distributes the total rate, in the order of the planned
        rates; None: the planned rates.
      rate: the total rate in requests per second; None: the planned total rate.
      pairs: prompt and output lengths to draw from; None: log-normal lengths with the planned
        means.

    Raises:
      WorkloadError: a negative rate or `alpha`, or mean lengths too close to a model's limit.
    """
    rates = planned_rates(plan)
    total = sum(rates.values())
    if alpha is not None:
        names = sorted(rates, key=lambda name: -rates[name])
        by_rank = power_law_rates(len(names), alpha, total=total if rate is None else rate)
        rates = dict(zip(names, by_rank, strict=True))
    elif rate is not None:
        rates = {name: rate * part / total if total else 0.0 for name, part in rates.items()}
    models = {model.name: model for unit in plan.units for model in unit.models}
    return [
        Traffic(
            name,
            rates[name],
            Sampled(pairs) if pairs else model_lengths(model, plan.shapes[model.kind]),
        )
        for name, model in models.items()
    ]


def model_lengths(model: PlannedModel, shape: ModelShape) -> Lengths:
    """Log-normal lengths whose limits add up to the model's longest request.

    Prompt and output have the same proportions in the longest request as in the mean request.
    """
    longest = longest_request(model, shape)
    prompt, output = max(1.0, model.prompt_tokens), max(1.0, model.output_tokens)
    prompt_part = prompt / (prompt + output)
    return LogNormal(
        prompt,
        output,
        max_prompt=max(1, int(prompt_part * longest)),
        max_output=max(1, int((1 - prompt_part) * longest)),
    )
