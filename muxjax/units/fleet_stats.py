"""What several units count, together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SUMS = ("requests", "pool_pages", "usable_pages", "free_pages", "cached_pages", "restarts")


def merged(units: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The stats of a fleet of several units.

    Args:
      units: `LiveUnit.stats` of each, by name.

    Returns:
      `units` as they are; sums of requests and pages; for each model its counters and the names of
      its units. Of a model with replicas these are sums, and what cannot be added, such as shares
      of a unit's time, is in `units` only.
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
        **{key: sum(stats[key] for stats in units.values()) for key in _SUMS},
        "steps": _steps(units),
        "pool_bytes": sum(stats["pool_bytes"] * len(stats["devices"]) for stats in units.values()),
        "programs": [program for stats in units.values() for program in stats["programs"]],
        "models": models,
        "units": dict(units),
    }


def _addable(key: str, value: object) -> bool:
    return key.endswith("_seconds") or (isinstance(value, int) and not isinstance(value, bool))


def _steps(units: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for stats in units.values():
        for kind, count in stats.get("steps", {}).items():
            total[kind] = total.get(kind, 0) + count
    return total
