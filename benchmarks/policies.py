"""Policies against each other on the real engine: what multiplexing brings, and where.

    python benchmarks/policies.py
    python benchmarks/policies.py --policies adbs,fcfs --alpha 2.1 --load 1 --rounds 2
    python benchmarks/policies.py --rounds 1 --seed 3 --output rounds.jsonl    # adds a round
    python benchmarks/policies.py --simulated --rounds 16    # steps are measured, then simulated

Three models (`three.yaml`, or any `--fleet`) get requests whose popularity falls as a power law.
For each `--alpha` and `--load` what requests take alone is measured first, and the rate that
saturates, which is what the reference policy delivers of a flood: a shared machine is not as fast
at all times. Then each policy replays the same workload at `--load` times that rate, policies in
turn, another one first in each cell, round after round, on one pool, with the same programs; each
round has arrivals of its own. All are told the rates of the models, so that shares and quotas,
those of `static` above all, are sized by what comes and not by what the fleet file expects.

A request counts if its whole latency is at most `--slo-scale` times what it takes alone (MuxServe's
measure, scale 8). What is compared is the *rate-weighted goodput*: for each model, requests that
count over the time to the last arrival, weighted by the model's part of all requests, added up.
`ratio` is the first policy's over the best of `--against`, in the same round.

A shared machine's speed swings, and where it is saturated that decides more than the policy does.
`--simulated` measures the steps once and has the rest simulated, on a machine that is always as
fast; `predict.py` says how far that can be trusted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from _common import print_json, show, surroundings

from muxjax.bench.compare import compare, extra_metrics, scheduler_targets
from muxjax.bench.isolated import IsolatedLatency, measure_isolated
from muxjax.bench.predict import rig_profile, simulate_rig
from muxjax.bench.replay import Replay, make_requests, replay
from muxjax.bench.session import BenchSession, check_policies
from muxjax.bench.step_recorder import measure_in_service
from muxjax.bench.workloads import WorkloadOptions, fleet_rates, make_workload
from muxjax.config.fleet_file import load_fleet_config
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.simulator.metrics import AttainmentCriterion, SimulationMetrics
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.workload.trace import TraceRequest
from muxjax.scheduling.policies.registry import policy_names

HERE = Path(__file__).parent
WANTED = ("slo", "static", "temporal", "mutex", "adbs", "fcfs", "round_robin")
FLOOD = 400
"""Requests that the saturating rate is found with. Fewer say too little, as batches fill up first
and run empty last: with 120 it came out 10 to 15 % lower than with 1,000, with 400 by 3 to 5 %."""
KEYS = ("rate_weighted_goodput", "rate_weighted_throughput", "total_throughput", "slo_attainment")


def main() -> None:
    """Measures and prints."""
    arguments = _arguments()
    rounds = read_rounds(arguments)
    if not arguments.rounds:
        report(rounds, arguments)
        return
    with BenchSession.load(load_fleet_config(arguments.fleet)) as rig:
        try:
            profile = rig_profile(rig, measure_in_service(rig)) if arguments.simulated else None
            for number in range(arguments.rounds):
                found = one_round(rig, arguments, arguments.seed + number, profile)
                rounds.append(found)
                if arguments.output is not None:
                    with arguments.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
        except KeyboardInterrupt:
            print("interrupted: what follows are the complete rounds", file=sys.stderr)
    report(rounds, arguments)


def read_rounds(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of the file to add to.

    Raises:
      SystemExit: a round lacks one of the policies, or was not made in the same way.
    """
    if arguments.output is None or not arguments.output.exists():
        return []
    rounds = [json.loads(line) for line in arguments.output.read_text().splitlines()]
    for number, found in enumerate(rounds, start=1):
        if found.get("simulated", False) != arguments.simulated:
            kind = "not simulated" if arguments.simulated else "simulated"
            raise SystemExit(f"{arguments.output}: round {number} is {kind}; name another file")
        for cell in found["cells"]:
            missing = sorted(set(arguments.policies) - set(cell["policies"]))
            if missing:
                there = ",".join(cell["policies"])
                raise SystemExit(
                    f"{arguments.output}: round {number} has no {', '.join(missing)};"
                    f" ask for what it has (--policies {there}), or name another file"
                )
    return rounds


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare policies on the real engine.")
    parser.add_argument("--fleet", type=Path, default=HERE / "three.yaml")
    there = [name for name in WANTED if name in policy_names()]
    parser.add_argument("--policies", default=",".join(there[:5]))
    parser.add_argument(
        "--against",
        default=",".join(name for name in ("static", "temporal") if name in there) or "fcfs",
        help="whose best the first policy is compared with",
    )
    parser.add_argument("--reference", default="adbs", help="finds the rate that saturates")
    parser.add_argument("--alpha", type=float, nargs="+", default=[2.1, 0.7])
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.75, 1.0, 1.25])
    parser.add_argument("--slo-scale", type=float, default=8.0)
    parser.add_argument("--duration", type=float, default=10.0, help="seconds of each workload")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simulated", action="store_true", help="simulate measured steps")
    parser.add_argument("--output", type=Path, help="add rounds to this file (JSON lines)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = parser.parse_args()
    found.policies = found.policies.split(",")
    found.against = found.against.split(",")
    check_policies([*found.policies, *found.against, found.reference])
    for name in found.against:
        if name not in found.policies:
            parser.error(f"--against {name} is not among --policies")
    return found


def one_round(
    rig: BenchSession, arguments: argparse.Namespace, seed: int, profile: ProfileTable | None = None
) -> dict[str, Any]:
    """All cells, once; simulated if there is a profile."""
    limits = {name: model.max_model_len for name, model in rig.models.items()}
    targets = {
        name: AttainmentCriterion.from_targets(scale=arguments.slo_scale, kind=name)
        for name in rig.models
    }

    def make(alpha: float, rate: float, **more: Any) -> list[TraceRequest]:
        asked = WorkloadOptions(alpha=alpha, rate=rate, seed=seed, **more)
        return make_workload(rig.config, limits, asked)

    solo = None
    cells = []
    for alpha in arguments.alpha:
        flood = make(alpha, 1e3, requests=FLOOD)
        for load in arguments.load:
            # Simulated steps are as fast in all cells.
            if solo is None or profile is None:
                solo = measure_isolated(rig, make(1.0, 10.0, requests=50))
            top = saturating_rate(rig, solo, flood, arguments.reference, profile)
            workload = make(alpha, load * top, seconds=arguments.duration)
            # Nobody is always the first to run, since a machine may slow down under load.
            first = len(cells) % len(arguments.policies)
            order = arguments.policies[first:] + arguments.policies[:first]
            rates = fleet_rates(rig.config, WorkloadOptions(alpha=alpha, rate=load * top))
            if profile is None:
                runs = compare(rig, workload, order, targets, solo, rates=rates, seed=seed)
                if runs[-1].replay.interrupted:
                    raise KeyboardInterrupt
                metrics = {run.policy: run.metrics for run in runs}
            else:
                metrics = {
                    policy: simulated(rig, profile, workload, policy, targets, solo, rates)
                    for policy in order
                }
            cells.append(
                {
                    "alpha": alpha,
                    "load": load,
                    "rate": load * top,
                    "requests": len(workload),
                    "policies": {
                        policy: {key: found[key] for key in KEYS}
                        for policy, found in metrics.items()
                    },
                }
            )
    return {
        "seed": seed,
        "slo_scale": arguments.slo_scale,
        "simulated": profile is not None,
        "cells": cells,
    }


def simulated(
    rig: BenchSession,
    profile: ProfileTable,
    workload: list[TraceRequest],
    policy: str,
    targets: Mapping[str, AttainmentCriterion],
    solo: IsolatedLatency,
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """What `compare` would measure, simulated."""
    asked = scheduler_targets(rig, targets, solo)
    records = simulate_rig(
        rig, profile, workload, policy, solo.estimates, targets=asked, rates=rates
    )
    metrics = SimulationMetrics(targets, solo.costs)
    for record in records:
        metrics.add(record)
    return extra_metrics(metrics.summary(), workload, Replay(records, _end(records)))


def saturating_rate(
    rig: BenchSession,
    solo: IsolatedLatency,
    flood: list[TraceRequest],
    policy: str,
    profile: ProfileTable | None,
) -> float:
    """Requests a second that are served when all come at once."""
    at_once = [TraceRequest(0.0, a.model, a.prompt_tokens, a.output_tokens) for a in flood]
    if profile is not None:
        return len(flood) / _end(simulate_rig(rig, profile, at_once, policy, solo.estimates))
    vocab = {name: model.config.vocab_size for name, model in rig.models.items()}
    limits = {name: model.max_model_len for name, model in rig.models.items()}
    with rig.engine(rig.unit(policy, solo.estimates)) as engine:
        done = replay(engine, at_once, make_requests(at_once, vocab, limits))
    if done.interrupted:
        raise KeyboardInterrupt
    return len(at_once) / done.seconds


def _end(records: list[RequestRecord]) -> float:
    return max(record.end or 0.0 for record in records)


def report(rounds: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Prints medians and spreads over the rounds."""
    cells: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for found in rounds:
        for cell in found["cells"]:
            cells.setdefault((cell["alpha"], cell["load"]), []).append(cell)
    first, rows = arguments.policies[0], []
    ratios: dict[str, float] = {}
    for (alpha, load), own in cells.items():
        each = [
            _ratio(
                cell["policies"][first]["rate_weighted_goodput"],
                max(cell["policies"][name]["rate_weighted_goodput"] for name in arguments.against),
            )
            for cell in own
        ]
        ratios[f"alpha {alpha:g}, load {load:g}"] = median(each)
        for policy in arguments.policies:
            row: dict[str, Any] = {"alpha": alpha, "load": load, "policy": policy}
            row["rate"] = median(cell["rate"] for cell in own)
            for key in KEYS:
                values = sorted(cell["policies"][policy][key] for cell in own)
                row[key] = median(values)
                row[f"{key}_lowest"], row[f"{key}_highest"] = values[0], values[-1]
            if policy == first:
                row["ratio"] = median(each)
                row["ratio_lowest"], row["ratio_highest"] = min(each), max(each)
            rows.append(row)
    if arguments.json:
        print_json({**surroundings(), "rounds": rounds, "rows": rows, "ratios": ratios})
        return
    table = [
        {
            "alpha": f"{row['alpha']:g}",
            "load": f"{row['load']:.0%}",
            "policy": row["policy"],
            "weighted goodput/s": _spread(row, "rate_weighted_goodput"),
            "weighted served/s": _spread(row, "rate_weighted_throughput"),
            "in target": _spread(row, "slo_attainment"),
            "ratio": _spread(row, "ratio") if "ratio" in row else "",
        }
        for row in rows
    ]
    if table:
        title = f"{len(rounds)} rounds; {first} against the best of {', '.join(arguments.against)}"
        if arguments.simulated:
            title += ", simulated"
        show(title, tuple(table[0]), table, scale=arguments.slo_scale)


def _ratio(ours: float, theirs: float) -> float:
    """Of two goodputs; infinite where only ours is above 0."""
    if theirs:
        return ours / theirs
    return float("inf") if ours else 1.0


def _spread(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.3g} ({row[f'{key}_lowest']:.3g}-{row[f'{key}_highest']:.3g})"


if __name__ == "__main__":
    main()
