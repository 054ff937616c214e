"""Compares scheduling policies on the real engine over popularity skews and loads.

For each `alpha` and `load` the isolated latency of the models is measured first, and then the
saturating rate: the rate of the reference policy when all requests arrive at once. Each policy
then replays the same workload at `load` times that rate. Policies run in turn on one pool with the
same compiled programs, starting with a different policy in each cell. Each round has different
arrivals. The scheduler gets the models' true rates, so that shares and quotas are sized for the
workload.

A request meets its target if its latency is at most `slo_scale` times its isolated latency
(MuxServe's metric). Policies are compared by *rate-weighted goodput*: for each model, the requests
that met their target per second until the last arrival, weighted by the model's share of all
requests, summed. `ratio` is the first policy's value over the best of `against` in the same round.

The speed of a shared machine varies. With `simulated`, steps are measured once and the rest is
simulated at constant speed; `muxjax bench predict` checks how accurate that is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from muxjax.bench.compare import compare, extra_metrics, scheduler_targets
from muxjax.bench.isolated import IsolatedLatency, measure_isolated
from muxjax.bench.replay import Replay, build_requests, replay
from muxjax.bench.session import BenchSession, check_policies
from muxjax.bench.simulated_session import session_profile, simulate_session
from muxjax.bench.step_recorder import measure_in_service
from muxjax.bench.workloads import WorkloadOptions, build_workload, fleet_rates
from muxjax.errors import BenchError
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.simulator.metrics import AttainmentCriterion, SimulationMetrics
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.workload.trace import TraceRequest

BURST_REQUESTS = 400
"""Requests of the burst that measures the saturating rate; shorter bursts underestimate it, because
batches are not full at its start and end."""
KEYS = ("rate_weighted_goodput", "rate_weighted_throughput", "total_throughput", "slo_attainment")


@dataclass(frozen=True)
class PolicyGrid:
    """A comparison of policies over a grid of skews and loads.

    Attributes:
      policies: the policies; the first one is compared with the best of `against`.
      against: baselines, all of them in `policies`.
      reference: the policy that the saturating rate is measured with.
      alphas: exponents of the power law of the models' popularity.
      loads: rates, as fractions of the saturating rate.
      slo_scale: allowed latency, as a multiple of the isolated latency.
      seconds: length of each workload.
      rounds: number of rounds to run.
      seed: seed of the first round; each round adds 1.
      simulated: simulate measured steps instead of running them.

    Raises:
      BenchError: an unknown policy, or a baseline that is not in `policies`.
    """

    policies: tuple[str, ...]
    against: tuple[str, ...]
    reference: str = "adbs"
    alphas: tuple[float, ...] = (2.1, 0.7)
    loads: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25)
    slo_scale: float = 8.0
    seconds: float = 10.0
    rounds: int = 5
    seed: int = 0
    simulated: bool = False

    def __post_init__(self) -> None:
        check_policies([*self.policies, *self.against, self.reference])
        for name in self.against:
            if name not in self.policies:
                raise BenchError(f"--against {name} is not in --policies")


def run_rounds(session: BenchSession, grid: PolicyGrid) -> Iterator[dict[str, Any]]:
    """Runs the rounds of a grid, one after the other."""
    profile = session_profile(session, measure_in_service(session)) if grid.simulated else None
    for number in range(grid.rounds):
        yield run_round(session, grid, grid.seed + number, profile)


def read_rounds(path: Path | None, grid: PolicyGrid) -> list[dict[str, Any]]:
    """The rounds in a file of earlier runs; none without a file.

    Raises:
      BenchError: a round lacks one of the policies, or differs from the grid in `simulated`.
    """
    if path is None or not path.exists():
        return []
    rounds = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, earlier in enumerate(rounds, start=1):
        if earlier.get("simulated", False) != grid.simulated:
            kind = "not simulated" if grid.simulated else "simulated"
            raise BenchError(f"{path}: round {number} is {kind}; name another file")
        for cell in earlier["cells"]:
            missing = sorted(set(grid.policies) - set(cell["policies"]))
            if missing:
                present = ",".join(cell["policies"])
                raise BenchError(
                    f"{path}: round {number} has no {', '.join(missing)}; run the policies "
                    f"in the file (--policies {present}), or name another file"
                )
    return rounds


def run_round(
    session: BenchSession, grid: PolicyGrid, seed: int, profile: ProfileTable | None = None
) -> dict[str, Any]:
    """Runs all cells of the grid once; with a profile, simulates them."""
    limits = {name: model.max_model_len for name, model in session.models.items()}
    targets = {
        name: AttainmentCriterion.from_targets(scale=grid.slo_scale, kind=name)
        for name in session.models
    }

    def build(alpha: float, rate: float, **options: Any) -> list[TraceRequest]:
        workload = WorkloadOptions(alpha=alpha, rate=rate, seed=seed, **options)
        return build_workload(session.config, limits, workload)

    isolated = None
    cells: list[dict[str, Any]] = []
    for alpha in grid.alphas:
        burst = build(alpha, 1e3, requests=BURST_REQUESTS)
        for load in grid.loads:
            # Simulated steps have the same speed in all cells.
            if isolated is None or profile is None:
                isolated = measure_isolated(session, build(1.0, 10.0, requests=50))
            saturating = saturating_rate(session, isolated, burst, grid.reference, profile)
            workload = build(alpha, load * saturating, seconds=grid.seconds)
            # A different policy runs first in each cell: a machine may slow down under load.
            first = len(cells) % len(grid.policies)
            order = grid.policies[first:] + grid.policies[:first]
            rates = fleet_rates(
                session.config, WorkloadOptions(alpha=alpha, rate=load * saturating)
            )
            if profile is None:
                runs = compare(session, workload, order, targets, isolated, rates=rates, seed=seed)
                if runs[-1].replay.interrupted:
                    raise KeyboardInterrupt
                metrics = {run.policy: run.metrics for run in runs}
            else:
                metrics = {
                    policy: simulate_policy(
                        session, profile, workload, policy, targets, isolated, rates
                    )
                    for policy in order
                }
            cells.append(
                {
                    "alpha": alpha,
                    "load": load,
                    "rate": load * saturating,
                    "requests": len(workload),
                    "policies": {
                        policy: {key: values[key] for key in KEYS}
                        for policy, values in metrics.items()
                    },
                }
            )
    return {
        "seed": seed,
        "slo_scale": grid.slo_scale,
        "simulated": profile is not None,
        "cells": cells,
    }


def simulate_policy(
    session: BenchSession,
    profile: ProfileTable,
    workload: list[TraceRequest],
    policy: str,
    targets: Mapping[str, AttainmentCriterion],
    isolated: IsolatedLatency,
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """Simulates the metrics that `compare` would measure for a policy."""
    slos = scheduler_targets(session, targets, isolated)
    records = simulate_session(
        session, profile, workload, policy, isolated.estimates, targets=slos, rates=rates
    )
    metrics = SimulationMetrics(targets, isolated.costs)
    for record in records:
        metrics.add(record)
    return extra_metrics(metrics.summary(), workload, Replay(records, _last_end(records)))


def saturating_rate(
    session: BenchSession,
    isolated: IsolatedLatency,
    burst: list[TraceRequest],
    policy: str,
    profile: ProfileTable | None,
) -> float:
    """Requests per second that a policy serves when all requests of a burst arrive at once."""
    at_once = [TraceRequest(0.0, r.model, r.prompt_tokens, r.output_tokens) for r in burst]
    if profile is not None:
        records = simulate_session(session, profile, at_once, policy, isolated.estimates)
        return len(burst) / _last_end(records)
    vocab = {name: model.config.vocab_size for name, model in session.models.items()}
    limits = {name: model.max_model_len for name, model in session.models.items()}
    with session.engine(session.new_scheduler(policy, isolated.estimates)) as engine:
        result = replay(engine, at_once, build_requests(at_once, vocab, limits))
    if result.interrupted:
        raise KeyboardInterrupt
    return len(at_once) / result.seconds


def _last_end(records: list[RequestRecord]) -> float:
    return max(record.end or 0.0 for record in records)


def summarize_rounds(
    rounds: Sequence[Mapping[str, Any]], grid: PolicyGrid
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Medians, minima and maxima over rounds.

    Returns:
      A row for each cell and policy, and the median ratio of each cell.
    """
    cells: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for completed in rounds:
        for cell in completed["cells"]:
            cells.setdefault((cell["alpha"], cell["load"]), []).append(cell)
    first = grid.policies[0]
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for (alpha, load), repeats in cells.items():
        round_ratios = [
            _ratio(
                cell["policies"][first]["rate_weighted_goodput"],
                max(cell["policies"][name]["rate_weighted_goodput"] for name in grid.against),
            )
            for cell in repeats
        ]
        ratios[f"alpha {alpha:g}, load {load:g}"] = median(round_ratios)
        for policy in grid.policies:
            row: dict[str, Any] = {"alpha": alpha, "load": load, "policy": policy}
            row["rate"] = median(cell["rate"] for cell in repeats)
            for key in KEYS:
                values = sorted(cell["policies"][policy][key] for cell in repeats)
                row[key] = median(values)
                row[f"{key}_lowest"], row[f"{key}_highest"] = values[0], values[-1]
            if policy == first:
                row["ratio"] = median(round_ratios)
                row["ratio_lowest"], row["ratio_highest"] = min(round_ratios), max(round_ratios)
            rows.append(row)
    return rows, ratios


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of `summarize_rounds` as texts for a table."""
    return [
        {
            "alpha": f"{row['alpha']:g}",
            "load": f"{row['load']:.0%}",
            "policy": row["policy"],
            "weighted goodput/s": _spread(row, "rate_weighted_goodput"),
            "weighted served/s": _spread(row, "rate_weighted_throughput"),
            "SLO attainment": _spread(row, "slo_attainment"),
            "ratio": _spread(row, "ratio") if "ratio" in row else "",
        }
        for row in rows
    ]


def _ratio(goodput: float, baseline: float) -> float:
    """A ratio of goodputs; infinite if only the baseline is 0, and 1 if both are."""
    if baseline:
        return goodput / baseline
    return float("inf") if goodput else 1.0


def _spread(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.3g} ({row[f'{key}_lowest']:.3g}-{row[f'{key}_highest']:.3g})"
