"""Summaries of policy-map cells: criteria, means, misses, and a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

TOLERANCE = 0.01
"""Accepted shortfall of `slo`: in attainment to the best baseline, in throughput to `adbs`."""

MAP_KEYS = ("execution", "hardware", "seed", "seconds", "chosen_ahead")
"""Keys that distinguish maps."""


def judge(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluates `slo` in a cell against the criteria."""
    shares = cell["slo_attainment"]
    others = {policy: share for policy, share in shares.items() if policy != "slo"}
    best = max(others, key=lambda policy: others[policy])
    ratios = {
        measure: cell["throughput"]["slo"][measure] / cell["throughput"]["adbs"][measure]
        for measure in ("total", "rate_weighted")
    }
    behind = others[best] - shares["slo"]
    return {
        "best_baseline": best,
        "ahead": -behind,
        "throughput_over_adbs": ratios,
        "passes": behind <= TOLERANCE + 1e-9 and min(ratios.values()) >= 1 - TOLERANCE,
    }


def summary(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each map: means, the worst cell, and the cells that miss the criteria."""
    maps = []
    for key in sorted({_map_key(cell) for cell in cells}):
        map_cells = [cell for cell in cells if _map_key(cell) == key]
        judgments = [judge(cell) for cell in map_cells]
        policies = [
            p
            for p in map_cells[0]["slo_attainment"]
            if all(p in c["slo_attainment"] for c in map_cells)
        ]
        means = {p: statistics.mean(c["slo_attainment"][p] for c in map_cells) for p in policies}
        maps.append(
            {
                **dict(zip(MAP_KEYS, key, strict=True)),
                "cells": len(map_cells),
                "mean_attainment": means,
                "higher_in_the_mean": means["slo"] > max(means[p] for p in means if p != "slo"),
                "worst": min(judgment["ahead"] for judgment in judgments),
                "least_throughput_over_adbs": min(
                    min(judgment["throughput_over_adbs"].values()) for judgment in judgments
                ),
                "missed": [
                    {name: cell[name] for name in ("alpha", "load", "slo_scale")} | judgment
                    for cell, judgment in zip(map_cells, judgments, strict=True)
                    if not judgment["passes"]
                ],
            }
        )
    return maps


def _map_key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell.get(key, False) for key in MAP_KEYS)


def concurrency_gains(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Attainment of `slo` with concurrent minus time-sliced execution, by cell."""
    names = ("hardware", "alpha", "load", "slo_scale", "seed", "seconds", "chosen_ahead")
    by_key: dict[tuple[Any, ...], dict[str, float]] = {}
    for cell in cells:
        key = tuple(cell.get(name, False) for name in names)
        by_key.setdefault(key, {})[cell["execution"]] = cell["slo_attainment"]["slo"]
    return [
        {
            **dict(zip(names, key, strict=True)),
            "concurrent_minus_time_sliced": both["concurrent"] - both["time_sliced"],
        }
        for key, both in sorted(by_key.items())
        if len(both) == 2
    ]


def is_complete(cell: Mapping[str, Any]) -> bool:
    """Whether a cell has the policies that the criteria compare."""
    return {"slo", "adbs"} <= set(cell["slo_attainment"])


def report(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of a map's file. Cells without `slo` or `adbs` are kept but not evaluated."""
    all_cells = sorted(cells, key=cell_key)
    complete = [cell for cell in all_cells if is_complete(cell)]
    return {
        "maps": summary(complete) if complete else [],
        "concurrent_minus_time_sliced": concurrency_gains(complete),
        "cells": [{**cell, **(judge(cell) if is_complete(cell) else {})} for cell in all_cells],
    }


def cell_key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """The identity of a cell: its map, coordinates and workload."""
    keys = (
        "execution",
        "hardware",
        "alpha",
        "load",
        "slo_scale",
        "seed",
        "seconds",
        "chosen_ahead",
    )
    return tuple(cell.get(key, False) for key in keys)


def print_summary(cells: Sequence[Mapping[str, Any]]) -> None:
    """Prints a row for each cell and the summary of each map on standard error."""
    console = Console(stderr=True, width=150)
    policies = list(cells[0]["slo_attainment"])
    table = Table("map", "alpha", "load", "scale", *policies, "thr/adbs", "")
    for cell in sorted(cells, key=cell_key):
        judgment = judge(cell)
        table.add_row(
            f"{cell['execution']} {cell['hardware']}",
            *(f"{cell[key]:g}" for key in ("alpha", "load", "slo_scale")),
            *(f"{100 * cell['slo_attainment'][policy]:.1f}" for policy in policies),
            f"{min(judgment['throughput_over_adbs'].values()):.3f}",
            "" if judgment["passes"] else "misses",
        )
    console.print(table)
    for row in summary(cells):
        means = ", ".join(f"{p} {100 * m:.1f}" for p, m in row["mean_attainment"].items())
        console.print(
            f"{row['execution']} {row['hardware']}: {len(row['missed'])} of {row['cells']} cells "
            f"miss; at worst {100 * row['worst']:+.1f} points; mean attainment: {means}"
        )
    gains = concurrency_gains(cells)
    for hardware in sorted({gain["hardware"] for gain in gains}):
        points = [
            100 * gain["concurrent_minus_time_sliced"]
            for gain in gains
            if gain["hardware"] == hardware
        ]
        console.print(
            f"{hardware}, concurrent minus time sliced under slo: {min(points):+.1f} to "
            f"{max(points):+.1f} points, mean {statistics.mean(points):+.2f}"
        )
