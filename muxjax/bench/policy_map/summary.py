"""What the cells of the policy map say together: bars, means, misses, and a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WITHIN = 0.01
"""How much less than the best baseline `slo` may attain, and serve than `adbs`."""


MAP = ("execution", "hardware", "seed", "seconds", "chosen_ahead")
"""What sets maps apart."""


def judge(cell: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell says of `slo`."""
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
        "passes": behind <= WITHIN + 1e-9 and min(ratios.values()) >= 1 - WITHIN,
    }


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each map its means, its worst cell, and the cells that miss."""
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
                **dict(zip(MAP, which, strict=True)),
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
    return tuple(cell.get(key, False) for key in MAP)


def sharing(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What programs side by side attain more than one at a time, cell by cell, under `slo`."""
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


def is_whole(cell: Mapping[str, Any]) -> bool:
    """Whether the policies are there that the bars are about."""
    return {"slo", "adbs"} <= set(cell["slo_attainment"])


def report(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that is known. Cells without `slo` or `adbs` are kept, and not judged."""
    everything = sorted(found, key=place_of)
    ordered = [cell for cell in everything if is_whole(cell)]
    return {
        "maps": summary(ordered) if ordered else [],
        "concurrent_minus_time_sliced": sharing(ordered),
        "cells": [{**cell, **(judge(cell) if is_whole(cell) else {})} for cell in everything],
    }


def place_of(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a cell is known by: its map, its place in it, and its workload."""
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


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """Prints a row for each cell, and what the maps say, on standard error."""
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
    for hardware in sorted({one["hardware"] for one in sharing(found)}):
        more = [
            100 * one["concurrent_minus_time_sliced"]
            for one in sharing(found)
            if one["hardware"] == hardware
        ]
        console.print(
            f"{hardware}, concurrent minus time sliced under slo: {min(more):+.1f} to "
            f"{max(more):+.1f} points, mean {statistics.mean(more):+.2f}"
        )
