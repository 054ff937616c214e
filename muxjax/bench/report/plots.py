"""Plots of results. Needs matplotlib: `muxjax[plot]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(kind: str, report: Mapping[str, Any]) -> Figure | None:
    """Plots a report; returns None if there is nothing to plot.

    Raises:
      ImportError: matplotlib is not installed.
    """
    draw = {"serve": _serve, "http": _http, "steps": _steps, "simulation": _simulation}[kind]
    return draw(report)


def _figure(columns: int) -> tuple[Figure, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * columns, 3.4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _serve(report: Mapping[str, Any]) -> Figure | None:
    medians = report["medians"]
    if not medians:
        return None
    figure, axes = _figure(3)
    for axis, (key, title, scale) in zip(
        axes,
        (
            ("rate_weighted_goodput", "weighted goodput (requests/s)", 1.0),
            ("slo_attainment", "within target (%)", 100.0),
            ("ttft_s_p99", "TTFT p99 (s)", 1.0),
        ),
        strict=True,
    ):
        known = {policy: summary[key] for policy, summary in medians.items() if summary[key]}
        middles = [scale * summary["median"] for summary in known.values()]
        errors = [
            [scale * abs(summary[end] - summary["median"]) for summary in known.values()]
            for end in ("lowest", "highest")
        ]
        axis.bar(list(known), middles, yerr=errors, capsize=4, color="#4477aa")
        axis.set(title=title, ylim=(0, None))
        axis.tick_params(axis="x", rotation=20)
        axis.grid(axis="y", alpha=0.3)
    return figure


def _http(report: Mapping[str, Any]) -> Figure | None:
    models = report.get("models") or {str(report.get("model_id", "all")): report}
    figure, axes = _figure(2)
    names = list(models)
    left, right = axes
    left.bar(names, [models[name].get("output_throughput") or 0.0 for name in names])
    left.set(title="output tokens/s")
    keys = [key for key in ("median_ttft_ms", "median_tpot_ms", "median_e2el_ms") if key in report]
    for index, key in enumerate(keys):
        values = [models[name].get(key) or 0.0 for name in names]
        positions = [position + index / (len(keys) + 1) for position in range(len(names))]
        right.bar(positions, values, width=1 / (len(keys) + 1), label=key.removesuffix("_ms"))
    right.set_xticks(range(len(names)), names)
    right.set(title="ms", yscale="log" if keys else "linear")
    if keys:
        right.legend(fontsize="small")
    for axis in axes:
        axis.tick_params(axis="x", rotation=20)
        axis.grid(axis="y", alpha=0.3)
    return figure


def _steps(report: Mapping[str, Any]) -> Figure | None:
    figure, (left, right) = _figure(2)
    for axis, phase, unit in ((left, "prefill", "ms per step"), (right, "decode", "ms per token")):
        steps = [step for step in report["steps"] if step["phase"] == phase and step["samples"]]
        most = max((step.get("tokens", 1) for step in steps), default=1)
        lines: dict[str, dict[int, float]] = {}
        for step in steps:
            if step.get("chunks", 1) == 1 and step.get("tokens", most) == most:
                line = lines.setdefault(f"{step['model']} {step['bucket']}", {})
                line[step["context"]] = step["median_ms"] / step.get("tokens", 1)
        for label, points in lines.items():
            axis.plot(sorted(points), [points[x] for x in sorted(points)], "o-", label=label)
        axis.set(title=f"{phase}: {unit}", xlabel="context (tokens)", ylim=(0, None))
        axis.grid(alpha=0.3)
        if lines:
            axis.legend(fontsize="x-small")
    return figure


def _simulation(report: Mapping[str, Any]) -> Figure | None:
    figure, (left, right) = _figure(2)
    for policy in report["policies"]:
        runs = [run for run in policy["runs"] if run["offered_rate"] is not None]
        rates = [run["offered_rate"] for run in runs]
        label = f"{policy['policy']} ({policy['execution'].replace('_', ' ')})"
        left.plot(rates, [run["total_throughput"] for run in runs], "o-", label=label)
        right.plot(rates, [100 * run["slo_attainment"] for run in runs], "o-", label=label)
    left.set(title="throughput (requests/s)", ylim=(0, None))
    right.set(title="within target (%)", ylim=(0, 102))
    for axis in (left, right):
        axis.set(xlabel="offered rate (requests/s)", xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure
