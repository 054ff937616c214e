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


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each map: means, the worst cell, and the cells that miss the criteria."""
    maps = []
    for which in sorted({_map_of(cell) for cell in found}):
        here = [cell for cell in found if _map_of(cell) == which]
        judged = [judge(cell) for cell in here]
        policies = [
            p for p in here[0]["slo_attainment"] if all(p in c["slo_attainment"] for c in here)
        ]
        means = {p: statistics.mean(c["slo_attainment"][p] for c in here) for p in policies}
        maps.append(
            {
                **dict(zip(MAP_KEYS, which, strict=True)),
                "cells": len(here),
                "mean_attainment": means,
                "higher_in_the_mean": means["slo"] > max(means[p] for p in means if p != "slo"),
                "worst": min(one["ahead"] for one in judged),
                "least_throughput_over_adbs": min(
                    min(one["throughput_over_adbs"].values()) for one in judged
                ),
                "missed": [
                    {key: cell[key] for key in ("alpha", "load", "slo_scale")} | one
                    for cell, one in zip(here, judged, strict=True)
                    if not one["passes"]
                ],
            }
        )
    return maps


def _map_of(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell.get(key, False) for key in MAP_KEYS)


def concurrency_gains(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Attainment of `slo` with concurrent minus time-sliced execution, by cell."""
    keys = ("hardware", "alpha", "load", "slo_scale", "seed", "seconds", "chosen_ahead")
    by_place: dict[tuple[Any, ...], dict[str, float]] = {}
    for cell in found:
        place = tuple(cell.get(key, False) for key in keys)
        by_place.setdefault(place, {})[cell["execution"]] = cell["slo_attainment"]["slo"]
    return [
        {
            **dict(zip(keys, place, strict=True)),
            "concurrent_minus_time_sliced": both["concurrent"] - both["time_sliced"],
        }
        for place, both in sorted(by_place.items())
        if len(both) == 2
    ]


def is_complete(cell: Mapping[str, Any]) -> bool:
    """Whether a cell has the policies that the criteria compare."""
    return {"slo", "adbs"} <= set(cell["slo_attainment"])


def report(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of a map's file. Cells without `slo` or `adbs` are kept but not evaluated."""
    everything = sorted(found, key=place_of)
    ordered = [cell for cell in everything if is_complete(cell)]
    return {
        "maps": summary(ordered) if ordered else [],
        "concurrent_minus_time_sliced": concurrency_gains(ordered),
        "cells": [{**cell, **(judge(cell) if is_complete(cell) else {})} for cell in everything],
    }


def place_of(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """The identity of a cell: its map, position and workload."""
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


def print_summary(found: Sequence[Mapping[str, Any]]) -> None:
    """Prints a row for each cell and the summary of each map on standard error."""
    console = Console(stderr=True, width=150)
    policies = list(found[0]["slo_attainment"])
    table = Table("map", "alpha", "load", "scale", *policies, "thr/adbs", "")
    for cell in sorted(found, key=place_of):
        one = judge(cell)
        table.add_row(
            f"{cell['execution']} {cell['hardware']}",
            *(f"{cell[key]:g}" for key in ("alpha", "load", "slo_scale")),
            *(f"{100 * cell['slo_attainment'][policy]:.1f}" for policy in policies),
            f"{min(one['throughput_over_adbs'].values()):.3f}",
            "" if one["passes"] else "misses",
        )
    console.print(table)
    for one in summary(found):
        means = ", ".join(f"{p} {100 * m:.1f}" for p, m in one["mean_attainment"].items())
        console.print(
            f"{one['execution']} {one['hardware']}: {len(one['missed'])} of {one['cells']} cells "
            f"miss; at worst {100 * one['worst']:+.1f} points; mean attainment: {means}"
        )
    for hardware in sorted({one["hardware"] for one in concurrency_gains(found)}):
        more = [
            100 * one["concurrent_minus_time_sliced"]
            for one in concurrency_gains(found)
            if one["hardware"] == hardware
        ]
        console.print(
            f"{hardware}, concurrent minus time sliced under slo: {min(more):+.1f} to "
            f"{max(more):+.1f} points, mean {statistics.mean(more):+.2f}"
        )
