"""Cells of a policy map."""

from __future__ import annotations

from typing import Any


def a_cell(execution: str = "time_sliced", served: float = 1.0, **shares: float) -> dict[str, Any]:
    return {
        "alpha": 0.7,
        "load": 1.0,
        "slo_scale": 2.0,
        "execution": execution,
        "hardware": "a100",
        "seed": 0,
        "seconds": 10.0,
        "slo_attainment": shares,
        "throughput": {
            policy: {"total": served if policy == "slo" else 1.0, "rate_weighted": 1.0}
            for policy in shares
        },
    }
