"""Merges the statistics of several units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SUMMED = ("requests", "pool_pages", "usable_pages", "free_pages", "cached_pages", "restarts")


def merge_stats(units: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the statistics of a fleet of several units.

    Args:
      units: `ServedUnit.stats` of each unit, by name.

    Returns:
      `units` unchanged, sums of requests and pages, and for each model its counters and the names
      of its units. The counters of a model on several units are sums. Values that cannot be added,
      such as shares of a unit's time, are in `units` only.
    """
    models: dict[str, dict[str, Any]] = {}
    for unit, stats in units.items():
        for name, counters in stats["models"].items():
            if name not in models:
                models[name] = {**counters, "units": [unit]}
                continue
            total = models[name]
            total["units"].append(unit)
            for key in [key for key in total if key in counters and not _addable(key, total[key])]:
                del total[key]
            for key, value in counters.items():
                if key in total:
                    total[key] += value
    return {
        "policy": next(iter(units.values()))["policy"],
        **{key: sum(stats[key] for stats in units.values()) for key in _SUMMED},
        "steps": _sum_steps(units),
        "pool_bytes": sum(stats["pool_bytes"] * len(stats["devices"]) for stats in units.values()),
        "programs": [program for stats in units.values() for program in stats["programs"]],
        "models": models,
        "units": dict(units),
    }


def _addable(key: str, value: object) -> bool:
    return key.endswith("_seconds") or (isinstance(value, int) and not isinstance(value, bool))


def _sum_steps(units: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for stats in units.values():
        for kind, count in stats.get("steps", {}).items():
            total[kind] = total.get(kind, 0) + count
    return total
