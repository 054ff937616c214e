"""The output of `muxjax plan`: models by unit, shares, and the memory of the devices."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from muxjax.placement.planner.plan import PlacementPlan, PlannedModel, PlannedUnit

_COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BAR = 40
_MAX_UNITS = 64


def show_plan(plan: PlacementPlan, console: Console) -> None:
    """Prints the table, the memory picture and the totals."""
    console.print(Group(_table(plan), Text(), _picture(plan), Text(), _totals(plan)))


def _table(plan: PlacementPlan) -> Table:
    sliced = plan.execution == "time_sliced"
    table = Table(box=None, pad_edge=False)
    table.add_column("unit")
    table.add_column("use", justify="right")
    table.add_column("model", overflow="fold")
    for heading in ("tp x replicas", "rate/s", "served/s", "prefill", "decode", "batch"):
        table.add_column(heading, justify="right")
    for heading in ("KV quota", "TTFT", "TPOT"):
        table.add_column(heading, justify="right")
    for unit in plan.units[:_MAX_UNITS]:
        for index, model in enumerate(unit.models):
            table.add_row(
                unit.name if index == 0 else "",
                f"{unit.use:.0%}" if index == 0 else "",
                model.name,
                f"{model.tp} x {model.replicas}",
                f"{model.rate:.3g}",
                _served(model),
                f"{model.prefill_time:.0%}",
                f"{model.decode_time if sliced else model.decode_share:.0%}",
                f"{model.batch:.3g}/{model.max_batch}",
                f"{model.kv_quota:.0%}",
                _seconds(model.ttft),
                _seconds(model.tpot),
            )
    return table


def _served(model: PlannedModel) -> Text:
    short = model.throughput < 0.999 * model.rate
    return Text(f"{model.throughput:.3g}", style="bold red" if short else "")


def _seconds(value: float | None) -> str:
    if value is None:
        return "grows"
    return f"{value * 1e3:.0f} ms" if value < 10 else f"{value:.0f} s"


def _picture(plan: PlacementPlan) -> RenderableType:
    """Returns a line for each unit: its devices, and a bar of the memory of each device."""
    memory = {device.name: device.memory for device in plan.devices}
    lines: list[RenderableType] = [
        Text("memory of each device: letters are weights, ░ KV pool, · reserved")
    ]
    shown = plan.units[:_MAX_UNITS]
    by_node = sorted(shown, key=lambda unit: (unit.node, unit.devices))
    for node, units in groupby(by_node, key=lambda unit: unit.node):
        for index, unit in enumerate(units):
            head = f"node {node} {unit.device}" if index == 0 else ""
            lines.append(_line(head, unit, memory[unit.device], plan))
    omitted = len(plan.units) - len(shown)
    if omitted:
        lines.append(Text(f"... and {omitted} more units: see --output or --json"))
    return Group(*lines)


def _line(head: str, unit: PlannedUnit, memory: float, plan: PlacementPlan) -> Text:
    first, last = unit.devices[0], unit.devices[-1]
    devices = str(first) if first == last else f"{first}-{last}"
    line = Text(f"{head:<18} {unit.name:<8} {devices:>5} |")
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
    line.append(f"| {memory / 1e9:.0f} GB ")
    for name, color in names:
        line.append(f" {name}", style=color)
    return line


def _totals(plan: PlacementPlan) -> Text:
    used = sum(unit.size for unit in plan.units)
    available = sum(nodes.nodes * nodes.devices for nodes in plan.cluster)
    served = f"serves {plan.throughput:.4g} of {plan.rate:.4g} requests/s"
    attainment = f"within targets and in full: {plan.slo_attainment:.1%} of requests"
    score = f"score {plan.score:.6g} ({plan.objective}), bound {plan.bound:.6g}, gap {plan.gap:.2%}"
    lines = [
        f"{served} on {used} of {available} devices, {plan.execution.replace('_', ' ')}",
        f"{attainment}; weighted by rate {plan.weighted_throughput:.4g} requests/s",
        f"{score}, found in {plan.seconds:.2f} s",
    ]
    if plan.upstream_score is not None:
        lines.append(f"by MuxServe's estimator: {plan.upstream_score:.4f}")
    if plan.throughput < 0.999 * plan.rate:
        lines.append("red: models with more requests than are served; their queues grow")
    return Text("\n".join(lines))
