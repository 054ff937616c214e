"""Whether plans keep their promise: `muxjax plan` against `muxjax simulate` on random fleets.

    python benchmarks/plan_trust.py
    python benchmarks/plan_trust.py --fleets 10 --seed 7 --policy slo --json

Each fleet has 2 to 8 models of random shapes, rates and lengths on a random cluster. Rates are
scaled so that the fleet needs a given part of the cluster's time (`--load`). The fleet is planned
as by `muxjax plan`. The plan is then simulated with other requests, and so is spatial partitioning
of the same cluster. Printed are

- `attainment_error_p95`: |promised - simulated| SLO attainment, 95th percentile, in points;
- `ttft_p99_ratio_p95`: promised over simulated p99 TTFT, or its inverse if that is above 1;
- `spatial_ahead_max`: the largest lead in attainment of spatial partitioning, in points.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import replace
from typing import Any

from muxjax.bench.script_output import print_json, print_table
from muxjax.errors import PlanError
from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.model_shape import ModelShape
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import PlacementPlan
from muxjax.placement.planner.planner import PlannerOptions
from muxjax.placement.simulator.fleet_plan import plan_fleet, promise_seconds
from muxjax.placement.simulator.plan_costs import plan_costs, plan_criteria
from muxjax.placement.simulator.planned_workload import planned_traffic
from muxjax.placement.simulator.simulated_units import SystemConfig
from muxjax.placement.simulator.simulation import SimulationSetup, run_simulation
from muxjax.placement.workload.synthetic import SyntheticWorkload
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.specs import LatencySlo

SHAPES = {
    "0.5b": ModelShape(24, 896, 4864, 14, 2, 64, 151936, True, max_position=32768),
    "1b": ModelShape(16, 2048, 8192, 32, 8, 64, 128256, True, max_position=131072),
    "4b": ModelShape(36, 2560, 9728, 32, 8, 128, 151936, True, max_position=40960),
    "8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, max_position=131072),
    "14b": ModelShape(48, 5120, 13824, 40, 8, 128, 152064, max_position=32768),
    "32b": ModelShape(64, 5120, 27648, 40, 8, 128, 152064, max_position=32768),
    "70b": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, max_position=131072),
}
CLUSTERS = (
    "1x1:a100-80gb",
    "1x2:a100-80gb",
    "1x4:a100-80gb",
    "2x4:a100-80gb",
    "1x4:h100",
    "1x8:v6e",
)
LENGTHS = ((161, 338), (1200, 250), (3000, 150), (300, 12), (500, 800), (60, 60))
"""Mean prompt and output lengths, in tokens."""
MEASURED_SEED = 1_000
"""Added to a fleet's seed for the workload that the promise is compared with."""


def main() -> None:
    """Plans and simulates all fleets and prints the comparison."""
    parser = argparse.ArgumentParser(description="Compare plans with simulations of them.")
    parser.add_argument("--fleets", type=int, default=50, help="number of fleets")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first fleet")
    parser.add_argument("--policy", default="adbs", help="scheduling policy")
    parser.add_argument("--load", default="0.2,0.8", help="least and greatest load of the cluster")
    parser.add_argument("--effort", type=float, default=1.0, help="effort of the search")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    low, high = map(float, options.load.split(","))
    rows = []
    for seed in range(options.seed, options.seed + options.fleets):
        row = compare(seed, (low, high), options.policy, options.effort)
        if row is not None:
            rows.append(row)
            print(f"{len(rows)}: {row['cluster']}, {row['models']} models", file=sys.stderr)
    result = {
        "fleets": len(rows),
        "attainment_error_p95": quantile([row["error"] for row in rows], 0.95),
        "ttft_p99_ratio_p95": quantile([row["ttft_ratio"] for row in rows], 0.95),
        "spatial_ahead_max": max([row["spatial_ahead"] for row in rows]),
        "planning_seconds_p50": quantile([row["seconds"] for row in rows], 0.5),
    }
    if options.json:
        print_json({**result, "rows": rows})
        return
    columns = ["seed", "cluster", "models", "promised", "simulated", "error", "ttft_ratio"]
    print_table("plans and simulations", [*columns, "spatial_ahead", "seconds"], rows)
    print_table("all fleets", list(result), [result])


def random_fleet(seed: int, load: tuple[float, float]) -> tuple[list[ModelLoad], str]:
    """Models with expected loads, and a cluster, from a seed."""
    rng = random.Random(seed)
    cluster = rng.choice(CLUSTERS)
    parsed = parse_cluster(cluster)
    costs = Roofline(SHAPES, parsed.groups[0].device)
    memory = parsed.num_devices * parsed.groups[0].device.memory
    loads: list[ModelLoad] = []
    weights = 0.0
    for index in range(rng.randint(2, 8)):
        kind = rng.choice(list(SHAPES))
        weights += costs.weight_bytes(kind, tp=1)
        if weights > 0.5 * memory:
            weights -= costs.weight_bytes(kind, tp=1)
            continue
        prompt, output = rng.choice(LENGTHS)
        expected = ExpectedLoad(math.exp(rng.gauss(0, 1.5)), prompt, output)
        slo = LatencySlo(ttft=rng.choice((1.0, 2.0, 5.0))) if rng.random() < 0.25 else LatencySlo()
        loads.append(ModelLoad(f"m{index}", kind, expected, slo))
    needed = sum(_device_seconds(item, costs) for item in loads) / parsed.num_devices
    factor = rng.uniform(*load) / needed if needed else 1.0
    return [
        replace(item, expected=replace(item.expected, rate=item.expected.rate * factor))
        for item in loads
    ], cluster


def _device_seconds(load: ModelLoad, costs: Roofline) -> float:
    """Device seconds per second of a model's load in batches of 32, on the fewest devices."""
    expected = load.expected
    tp = next(
        tp
        for tp in costs.tp_sizes(load.kind)
        if costs.weight_bytes(load.kind, tp=tp) < 0.7 * costs.device.memory
    )
    prefill = costs.prefill_seconds(
        load.kind, expected.prompt_tokens, expected.prompt_tokens, tp=tp
    )
    decode = costs.decode_seconds(load.kind, 32, expected.decode_context, tp=tp) / 32
    return expected.rate * tp * (prefill + expected.output_tokens * decode)


def compare(
    seed: int, load: tuple[float, float], policy: str, effort: float
) -> dict[str, Any] | None:
    """The promise of one fleet's plan and its simulation; None if the fleet fits nowhere."""
    loads, cluster = random_fleet(seed, load)
    if not loads:
        return None
    parsed = parse_cluster(cluster)
    costs = [Roofline(SHAPES, group.device) for group in parsed.groups]
    options = PlannerOptions(objective="slo", effort=effort, seed=seed)
    began = time.perf_counter()
    try:
        plan = plan_fleet(loads, parsed, costs, options, policy=policy)
    except PlanError as error:
        print(f"fleet {seed}: {error}", file=sys.stderr)
        return None
    seconds = time.perf_counter() - began
    assert plan.simulation is not None
    result = simulate(plan, policy, seed)
    try:
        spatial = simulate(plan, "spatial", seed)["slo_attainment"]
    except PlanError:
        spatial = 0.0
    promised, simulated = plan.slo_attainment, result["slo_attainment"]
    ratio = (plan.simulation.ttft_p99 or 1e-9) / (result["ttft_s"]["p99"] or 1e-9)
    return {
        "seed": seed,
        "cluster": cluster,
        "models": len(loads),
        "promised": 100 * promised,
        "simulated": 100 * simulated,
        "error": 100 * abs(promised - simulated),
        "ttft_ratio": max(ratio, 1 / ratio),
        "spatial_ahead": 100 * (spatial - simulated),
        "seconds": seconds,
    }


def simulate(plan: PlacementPlan, policy: str, seed: int) -> dict[str, Any]:
    """The metrics of a plan under other requests than those of its promise."""
    seed += MEASURED_SEED
    costs = plan_costs(plan)
    workload = SyntheticWorkload(planned_traffic(plan), promise_seconds(plan.rate), seed=seed)
    setup = SimulationSetup(plan, costs, plan_criteria(plan, costs), seed=seed)
    return run_simulation(setup, SystemConfig(policy, plan.execution), workload)


def quantile(values: list[float], fraction: float) -> float:
    """The smallest value that this fraction of all values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


if __name__ == "__main__":
    main()
