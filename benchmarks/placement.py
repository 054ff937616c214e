"""Quality and time of planning, relative to MuxServe's optimizer and to the upper bound.

    python benchmarks/placement.py [--json] [--plot FILE.svg]

1. The three ChatLMSYS fleets (16 models, 32 A100s; `../shared/data`, or `MUXJAX_SHARED_DATA`), with
   the lengths that MuxServe's optimizer assumes: scores of its plan and of MuxJAX's, by both
   estimators, and planning time. The limit is a tenth of the time of MuxServe's optimizer.
2. Fleets with power-law popularity on 1 to 128 nodes of 8 H100s: time, memory, gap to the bound.

Processor times are compared; planning has one thread. Wall time is printed as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.model_shape import LLAMA_SHAPES, ModelShape
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.planner import PlannerOptions, plan_placement
from muxjax.scheduling.expected_load import ExpectedLoad

CASES = {
    "condense500": (5.2096, 8.8),
    "condense1200": (9.5086, 7.1),
    "condense1600": (10.5986, 3.9),
}
"""Score and seconds of MuxServe's optimizer."""
REPEATS = 3
SIZES = ((1, 4), (2, 8), (4, 16), (8, 32), (16, 64), (32, 128), (64, 240), (128, 400))
SHAPES = {
    **LLAMA_SHAPES,
    "llama3-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, small_params=65 * 4096),
    "llama3-70b": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, small_params=161 * 8192),
    "llama3-1b": ModelShape(16, 2048, 8192, 32, 8, 64, 128256, True, small_params=33 * 2048),
}


def chatlmsys(data: Path, case: str) -> dict[str, Any]:
    """Plans one of the three fleets with MuxServe's search and with MuxJAX's."""
    upstream, seconds = CASES[case]
    models = yaml.safe_load((data / "chatlmsys" / f"{case}.yaml").read_text())["models"]
    loads = [
        ModelLoad(m["name"], m["model"], ExpectedLoad(m["rate"], 161.0, 337.0)) for m in models
    ]
    cluster = parse_cluster("4x8:a100-80gb")

    def planned(as_upstream: bool) -> tuple[Any, float]:
        durations, plan = [], None
        for _ in range(REPEATS):
            began, used = time.perf_counter(), time.process_time()
            table = ProfileTable(data / "muxserve_a100_profile.json")
            options = PlannerOptions("concurrent", as_upstream=as_upstream)
            plan = plan_placement(loads, cluster, [table], options, began=began)
            durations.append(time.process_time() - used)
        return plan, sorted(durations)[len(durations) // 2]

    reproduced, reproduced_seconds = planned(True)
    plan, plan_seconds = planned(False)
    return {
        "case": case,
        "upstream_score": plan.upstream_score,
        "upstream_score_of_upstream": upstream,
        "upstream_score_as_reproduced": reproduced.upstream_score,
        "score": plan.score,
        "score_of_upstream": reproduced.score,
        "bound": plan.bound,
        "seconds": plan.seconds,
        "cpu_seconds": plan_seconds,
        "cpu_seconds_as_reproduced": reproduced_seconds,
        "seconds_of_upstream": seconds,
        "faster": seconds / plan_seconds,
        "passes": plan.upstream_score >= upstream
        and plan.score > reproduced.score
        and plan_seconds <= seconds / 10,
    }


def scaled(nodes: int, models: int) -> dict[str, Any]:
    """Plans a fleet with power-law popularity whose load is about the capacity of the nodes."""
    rand = random.Random(0)
    rates = [rand.paretovariate(1.1) for _ in range(models)]
    scale = 12 * nodes * 8 / sum(rates)
    kinds = list(SHAPES)
    loads = [
        ModelLoad(f"model-{index}", rand.choice(kinds), ExpectedLoad(rate * scale))
        for index, rate in enumerate(rates)
    ]
    cluster = parse_cluster(f"{nodes}x8:h100")
    used = time.process_time()
    plan = plan_placement(loads, cluster, [Roofline(SHAPES, cluster.groups[0].device)])
    used = time.process_time() - used
    return {
        "nodes": nodes,
        "models": models,
        "seconds": plan.seconds,
        "cpu_seconds": used,
        "gap": plan.gap,
        "units": len(plan.units),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "limit_seconds": 20.0,
        "passes": used < 20 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1e6,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots time by size, both logarithmic, as SVG."""
    from math import log10

    left, bottom, width, height = 60, 260, 400, 220
    xs = [log10(row["models"]) for row in rows]
    ys = [log10(max(row["cpu_seconds"], 1e-3)) for row in rows]
    low, high = -2.0, 2.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0])
        return left + width * across, bottom - height * (y - low) / (high - low)

    points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
    svg = 'xmlns="http://www.w3.org/2000/svg" width="500" height="310"'
    parts = [
        f'<svg {svg} font-family="sans-serif" font-size="11">',
        '<rect width="500" height="310" fill="white"/>',
        '<text x="60" y="20">Seconds to plan by number of models (nodes of 8 H100s)</text>',
    ]
    for power in range(int(low), int(high) + 1):
        _, y = place(xs[0], power)
        parts.append(f'<path d="M{left} {y:.0f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="10" y="{y + 4:.0f}">{10.0**power:g} s</text>')
    _, limit = place(xs[0], log10(20))
    parts.append(f'<path d="M{left} {limit:.0f}h{width}" stroke="red" stroke-dasharray="4"/>')
    line = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="2"/>')
    for (x, y), row in zip(points, rows, strict=True):
        parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="#06c"/>')
        label = f"{row['models']} ({row['nodes']})"
        parts.append(f'<text x="{x - 15:.0f}" y="{bottom + 18}">{label}</text>')
    parts.append("</svg>")
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows as a table."""
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=170).print(table)


def main() -> None:
    """Runs both parts and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, help="plot time by size (SVG)")
    options = parser.parse_args()
    default = Path("..", "shared", "data")
    data = Path(os.environ.get("MUXJAX_SHARED_DATA") or default)
    report: dict[str, Any] = {}
    if data.is_dir():
        report["chatlmsys"] = [chatlmsys(data, case) for case in CASES]
    else:
        print(f"no shared data at {data}: the ChatLMSYS fleets are skipped", file=sys.stderr)
    report["scale"] = [scaled(nodes, models) for nodes, models in SIZES]
    if options.plot:
        plot(report["scale"], options.plot)
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for title, rows in report.items():
        show(title, rows)


if __name__ == "__main__":
    main()
