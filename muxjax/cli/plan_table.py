"""The output of `muxjax plan` and of `muxjax simulate`, in 80 columns.

A plan: models by unit, memory of the devices, totals. A simulation: a table of the models for each
run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from muxjax.placement.planner.plan import (
    PlacementPlan,
    PlannedModel,
    PlannedTarget,
    PlannedUnit,
)

_COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BAR = 32
_MAX_UNITS = 64
_COLUMNS = 80
_LOW_ATTAINMENT = 0.99
"""Attainment below which a model is shown in red."""

_LEGEND = """\
served: each model's finished requests / time of its last one, added up.
weighted: the same, models weighted by their part of the requests (MuxServe).
goodput: requests in time / time of the last completion.
in time: part of all requests that met their target; rejected ones did not."""


def show_plan(plan: PlacementPlan, console: Console, *, wide: bool = False) -> None:
    """Prints the table, the memory picture and the totals.

    Args:
      plan: the plan.
      console: where to print.
      wide: also show shares of device time and of the KV pool, and batches.
    """
    console.print(Group(_table(plan, wide), Text(), _picture(plan), Text(), _totals(plan)))


def _table(plan: PlacementPlan, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("unit", no_wrap=True)
    table.add_column("use", justify="right", no_wrap=True)
    table.add_column("model", overflow="fold")
    for heading in ("tp x n", "rate/s", "in time", "TTFT p50", "p99", "TPOT"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("target", overflow="fold")
    if wide:
        for heading in ("served/s", "prefill", "decode", "batch", "KV quota"):
            table.add_column(heading, justify="right", no_wrap=True)
    for unit in plan.units[:_MAX_UNITS]:
        for index, model in enumerate(unit.models):
            cells = [
                unit.name if index == 0 else "",
                f"{unit.use:.0%}" if index == 0 else "",
                model.name,
                f"{model.tp} x {model.replicas}",
                f"{model.rate:.3g}",
                *_service(plan, model.name),
                _target(plan.targets.get(model.name)),
            ]
            table.add_row(*cells, *(_details(plan, model) if wide else ()))
    return table


def _service(plan: PlacementPlan, model: str) -> list[str | Text]:
    """Attainment, TTFT and TPOT of a model, on all of its units together."""
    service = None if plan.simulation is None else plan.simulation.models.get(model)
    if service is None or service.slo_attainment is None:
        return ["-"] * 4
    style = "bold red" if service.slo_attainment < _LOW_ATTAINMENT else ""
    return [
        Text(f"{service.slo_attainment:.1%}", style=style),
        format_seconds(service.ttft_p50),
        format_seconds(service.ttft_p99),
        format_seconds(service.tpot_p50),
    ]


def _target(target: PlannedTarget | None) -> str:
    if target is None:
        return "-"
    if target.scale is not None:
        return f"{target.scale:g}x"
    return f"{format_seconds(target.ttft)}/{format_seconds(target.tpot)}"


def _details(plan: PlacementPlan, model: PlannedModel) -> list[str]:
    sliced = plan.execution == "time_sliced"
    return [
        f"{model.throughput:.3g}",
        f"{model.prefill_time:.0%}",
        f"{model.decode_time if sliced else model.decode_share:.0%}",
        f"{model.batch:.3g}/{model.max_batch}",
        f"{model.kv_quota:.0%}",
    ]


def format_seconds(value: float | None) -> str:
    """Formats a time in three digits, such as `82ms` or `4.48s`."""
    if value is None:
        return "-"
    if value < 0.01:
        return f"{value * 1e3:.1f}ms"
    return f"{value * 1e3:.0f}ms" if value < 1 else f"{value:.3g}s"


def _picture(plan: PlacementPlan) -> RenderableType:
    """For each unit its devices, a bar of the memory of each device, and its models."""
    memory = {device.name: device.memory for device in plan.devices}
    lines = [Text("memory of each device: letters are weights, ░ KV pool, · reserved")]
    shown = plan.units[:_MAX_UNITS]
    for unit in sorted(shown, key=lambda unit: (unit.node, unit.devices)):
        lines.append(_memory_bar(unit, memory[unit.device], plan))
    left = len(plan.units) - len(shown)
    if left:
        lines.append(Text(f"... and {left} more units: see --output or --json"))
    return Group(*lines)


def _memory_bar(unit: PlannedUnit, memory: float, plan: PlacementPlan) -> Text:
    first, last = unit.devices[0], unit.devices[-1]
    devices = f"{first}" if first == last else f"{first}-{last}"
    line = Text(f"{unit.name:<8} node {unit.node}: {devices:<5} |")
    weights = [plan.shapes[model.kind].weight_bytes(model.tp) for model in unit.models]
    scale = unit.weight_bytes / sum(weights) if sum(weights) else 1.0
    names = []
    drawn = 0
    end = 0.0
    for index, (model, size) in enumerate(zip(unit.models, weights, strict=True)):
        letter, color = _LETTERS[index % len(_LETTERS)], _COLORS[index % len(_COLORS)]
        end += size * scale
        right = max(drawn + 1, round(_BAR * end / memory))
        line.append(letter * (right - drawn), style=color)
        drawn = right
        names.append((f"{letter} {model.name}", color))
    pool = max(0, round(_BAR * (end + unit.kv_bytes) / memory) - drawn)
    line.append("░" * pool)
    line.append("·" * max(0, _BAR - drawn - pool))
    line.append(f"| {memory / 1e9:.0f} GB {unit.device}")
    column = _COLUMNS
    for name, color in names:
        if column + len(name) + 2 > _COLUMNS:
            line.append("\n" + " " * 22)
            column = 22
        line.append(f"{name}  ", style=color)
        column += len(name) + 2
    return line


def _totals(plan: PlacementPlan) -> Text:
    used = sum(unit.size for unit in plan.units)
    available = sum(nodes.nodes * nodes.devices for nodes in plan.cluster)
    execution = plan.execution.replace("_", " ")
    lines = []
    simulation = plan.simulation
    if simulation is not None and simulation.slo_attainment is not None:
        lines.append(
            f"{simulation.slo_attainment:.1%} of requests in time; "
            f"TTFT p99 {format_seconds(simulation.ttft_p99)}"
        )
        lines.append(
            f"  simulated: {simulation.seconds:g} s at {plan.rate:.4g} requests/s (Poisson), "
            f"policy {simulation.policy}"
        )
    lines.append(
        f"steady state: serves {plan.throughput:.4g} of {plan.rate:.4g} requests/s on {used} of "
        f"{available} devices"
    )
    lines.append(
        f"objective {plan.objective}: score {plan.score:.5g}, upper bound {plan.bound:.5g}; "
        f"{execution}, found in {plan.seconds:.1f} s"
    )
    if plan.upstream_score is not None:
        lines.append(f"by MuxServe's estimator: {plan.upstream_score:.4f}")
    if plan.throughput < 0.999 * plan.rate:
        lines.append("some requests cannot be served: their models' queues grow without limit")
    lines += [
        "",
        "use: part of the unit's capacity. tp x n: devices of a replica x replicas.",
        "in time: requests that meet the target: TTFT/TPOT, or for the whole request a",
        "multiple (8x) of its latency with no other load. TPOT: median time per token.",
    ]
    return Text("\n".join(lines))


# Simulations


def show_runs(policies: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints a table for each policy, its highest rate with 99 % attainment, and the legend.

    Args:
      policies: results of `simulation.sweep_rates`.
      console: where to print.
    """
    for policy in policies:
        for run in policy["runs"]:
            console.print(_run_table(policy["policy"], run))
            console.print(_run_totals(run), highlight=False)
            console.print()
    for policy in policies:
        highest = policy["max_rate_at_99"]
        rate = "none of these" if highest is None else f"{highest:.3g} requests/s"
        console.print(
            f"{policy['policy']}: highest rate with 99 % in time: {rate}", highlight=False
        )
    console.print(_LEGEND, highlight=False)


def _run_table(policy: str, run: Mapping[str, Any]) -> Table:
    title = f"{policy}, rates x {run['rate_scale']:.3g}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("requests", "rate/s", "in time", "TTFT p50", "p99", "TPOT p50", "p99", "lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, service in [*run["models"].items(), ("all", run)]:
        if service["requests"] or name == "all":
            table.add_row(name, *_service_row(service))
    return table


def _service_row(service: Mapping[str, Any]) -> list[str]:
    attainment, rate = service["slo_attainment"], service["offered_rate"]
    return [
        str(service["requests"]),
        "-" if rate is None else f"{rate:.3g}",
        "-" if attainment is None else f"{attainment:.1%}",
        format_seconds(service["ttft_s"]["p50"]),
        format_seconds(service["ttft_s"]["p99"]),
        format_seconds(service["tpot_s"]["p50"]),
        format_seconds(service["tpot_s"]["p99"]),
        str(service["rejected"] + service["failed"]),
    ]


def _run_totals(run: Mapping[str, Any]) -> str:
    return (
        f"served {run['total_throughput']:.3g}/s, "
        f"weighted {run['rate_weighted_throughput']:.3g}/s, "
        f"goodput {run['request_goodput']:.3g}/s"
    )
