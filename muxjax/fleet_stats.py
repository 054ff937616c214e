"""What several units count, together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SUMS = ("requests", "pool_pages", "usable_pages", "free_pages", "restarts")


def merged(units: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The stats of a fleet of several units.

    Args:
      units: `LiveUnit.stats` of each, by name.

    Returns:
      `units` as they are; sums of requests and pages; for each model the sums of its counters and
      the names of its units. What cannot be added, such as shares of a unit's time, is in `units`.
    """
    models: dict[str, dict[str, Any]] = {}
    for unit, stats in units.items():
        for name, counters in stats["models"].items():
            total = models.setdefault(name, {"units": []})
            total["units"].append(unit)
            for key, value in counters.items():
                addable = isinstance(value, int) or key.endswith("_seconds")
                if addable and not isinstance(value, bool):
                    total[key] = total.get(key, 0) + value
    return {
        "policy": next(iter(units.values()))["policy"],
        **{key: sum(stats[key] for stats in units.values()) for key in _SUMS},
        "steps": _steps(units),
        "pool_bytes": sum(stats["pool_bytes"] * len(stats["devices"]) for stats in units.values()),
        "programs": [program for stats in units.values() for program in stats["programs"]],
        "models": models,
        "units": dict(units),
    }


def _steps(units: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for stats in units.values():
        for kind, count in stats.get("steps", {}).items():
            total[kind] = total.get(kind, 0) + count
    return total
