"""Speed and memory of the simulator.

    python benchmarks/simulator.py [--requests N] [--json]

- A run of 4,089 requests to 17 models on 32 devices, with ShareGPT's lengths: seconds, relative to
  a limit of 10, for time-sliced and for concurrent execution. In concurrent execution a decode step
  generates one token, so there are eight times as many steps.
- The same fleet with more requests: time per generated token, which should be constant.
- A long trace of short requests: peak memory for a tenth of the trace and for the full trace.

Step times are from the roofline model. Times are processor times.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.model_shape import LLAMA_SHAPES
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import Execution, PlacementPlan
from muxjax.placement.planner.planner import PlannerOptions, plan_placement
from muxjax.placement.simulator.metrics import AttainmentCriterion
from muxjax.placement.simulator.plan_costs import plan_costs, plan_criteria
from muxjax.placement.simulator.planned_workload import planned_traffic
from muxjax.placement.simulator.simulated_units import SystemConfig
from muxjax.placement.simulator.simulation import SimulationSetup, run_simulation
from muxjax.placement.workload.arrivals import power_law_rates
from muxjax.placement.workload.lengths import LogNormal
from muxjax.placement.workload.synthetic import SyntheticWorkload, Traffic
from muxjax.progress import Bars
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.specs import DEFAULT_SCALE

REQUESTS = 4089
LIMIT_SECONDS = 10.0
KINDS = ["llama-7b"] * 8 + ["llama-13b"] * 5 + ["llama-30b"] * 2 + ["llama-65b"] * 2
TOTAL_RATE = 40.0
MULTIPLES = (1, 2, 4)
_MB = 1e6


def fleet_plan(execution: Execution) -> PlacementPlan:
    """Plans 17 models of MuxServe's sizes on 32 devices, with power-law popularity."""
    cluster = parse_cluster("4x8:a100-80gb")
    rates = power_law_rates(len(KINDS), 0.9, total=TOTAL_RATE)
    loads = [
        ModelLoad(f"model-{index}", kind, ExpectedLoad(rate))
        for index, (kind, rate) in enumerate(zip(KINDS, rates, strict=True))
    ]
    costs = [Roofline(LLAMA_SHAPES, group.device) for group in cluster.groups]
    return plan_placement(loads, cluster, costs, PlannerOptions(execution=execution))


def timed(
    setup: SimulationSetup, system: SystemConfig, workload: SyntheticWorkload
) -> tuple[float, dict[str, Any]]:
    """Returns the processor time of a run in seconds, and its metrics."""
    began = time.process_time()
    result = run_simulation(setup, system, workload)
    return time.process_time() - began, result


def set_up(plan: PlacementPlan) -> SimulationSetup:
    """Returns the setup of a plan, with eight times the isolated latency as the target."""
    costs = plan_costs(plan)
    return SimulationSetup(
        plan,
        costs,
        plan_criteria(plan, costs, AttainmentCriterion.from_targets(scale=DEFAULT_SCALE)),
    )


def speed(execution: Execution, bars: Bars) -> dict[str, Any]:
    """Measures runs of 4,089 and more requests."""
    setup = set_up(fleet_plan(execution))
    system = SystemConfig("adbs", execution)
    runs = []
    for multiple in MULTIPLES:
        workload = SyntheticWorkload(planned_traffic(setup.plan), count=multiple * REQUESTS)
        seconds, result = timed(setup, system, workload)
        tokens = result["output_tokens_per_s"] * result["seconds"]
        runs.append(
            {
                "requests": result["requests"],
                "generated_tokens": round(tokens),
                "seconds": seconds,
                "us_per_token": seconds / tokens * 1e6,
            }
        )
        bars.advance("simulating", 1, f"{result['requests']} requests, {execution}")
    return {
        "runs": runs,
        "seconds": runs[0]["seconds"],
        "limit_seconds": LIMIT_SECONDS,
        "part_of_limit": runs[0]["seconds"] / LIMIT_SECONDS,
        "growth_per_token": runs[-1]["us_per_token"] / runs[0]["us_per_token"],
    }


def memory(requests: int, bars: Bars) -> dict[str, Any]:
    """Measures peak memory of Python objects for a tenth of a long trace and for the full trace."""
    cluster = parse_cluster("1x1:h200")
    loads = [ModelLoad(name, "llama-7b", ExpectedLoad(40.0, 16.0, 8.0)) for name in ("a", "b")]
    plan = plan_placement(loads, cluster, [Roofline(LLAMA_SHAPES, cluster.groups[0].device)])
    setup = set_up(plan)
    lengths = LogNormal(16.0, 8.0, max_prompt=512, max_output=256)
    traffic = [Traffic(load.name, load.expected.rate, lengths) for load in loads]
    peaks = []
    for count in (requests // 10, requests):
        tracemalloc.start()
        result = run_simulation(
            setup, SystemConfig("adbs"), SyntheticWorkload(traffic, count=count)
        )
        peaks.append(tracemalloc.get_traced_memory()[1] / _MB)
        tracemalloc.stop()
        assert result["finished"] == count
        bars.advance("simulating", 1, f"{count} requests, memory")
    return {
        "requests": requests,
        "peak_mb_tenth": peaks[0],
        "peak_mb": peaks[1],
        "growth": peaks[1] / peaks[0],
    }


def main() -> None:
    """Runs all parts and prints the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--requests", type=int, default=100_000, help="number of requests of the long trace"
    )
    parser.add_argument("--json", action="store_true", help="only JSON")
    arguments = parser.parse_args()
    executions: tuple[Execution, ...] = ("time_sliced", "concurrent")
    total = len(executions) * len(MULTIPLES) + 2
    with Bars({"simulating": total}, show=True) as bars:
        report: dict[str, Any] = {
            "speed": {execution: speed(execution, bars) for execution in executions},
            "memory": memory(arguments.requests, bars),
        }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


def show(report: Mapping[str, Any]) -> None:
    """Prints tables."""
    table = Table("execution", "requests", "tokens", "seconds", "of the limit", "us per token")
    for execution, result in report["speed"].items():
        for index, run in enumerate(result["runs"]):
            table.add_row(
                execution,
                str(run["requests"]),
                str(run["generated_tokens"]),
                f"{run['seconds']:.2f}",
                f"{result['part_of_limit']:.2f}" if index == 0 else "",
                f"{run['us_per_token']:.2f}",
            )
    console = Console()
    console.print(table)
    usage = report["memory"]
    console.print(
        f"memory: {usage['peak_mb_tenth']:.1f} MB for {usage['requests'] // 10} requests, "
        f"{usage['peak_mb']:.1f} MB for {usage['requests']}: {usage['growth']:.2f} times"
    )


if __name__ == "__main__":
    main()
