"""Runs several policies on one workload in turn, round by round, on the real engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from muxjax.bench.isolated import IsolatedLatency
from muxjax.bench.replay import Replay, build_requests, replay
from muxjax.bench.session import BenchSession
from muxjax.placement.simulator.metrics import AttainmentCriterion, SimulationMetrics
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.workload.trace import TraceRequest
from muxjax.scheduling.fairness import jain_index
from muxjax.scheduling.specs import LatencySlo
from muxjax.scheduling.timeline import Timeline

OnRecord = Callable[[RequestRecord, bool], None]
HEADLINES = (
    "total_throughput",
    "rate_weighted_throughput",
    "rate_weighted_goodput",
    "request_goodput",
    "slo_attainment",
    "jain_index",
    "output_tokens_per_s",
)
"""Metrics, besides latencies, that are summarized over rounds."""
_LATENCIES = ("ttft_s", "tpot_s", "latency_s")


@dataclass(frozen=True)
class PolicyRun:
    """One policy's run in one round.

    Attributes:
      policy, round: the policy, and the index of the round.
      metrics: keys of `SimulationMetrics.summary` and of `extra_metrics`.
      replay: the finished run.
    """

    policy: str
    round: int
    metrics: dict[str, Any]
    replay: Replay


def compare(
    session: BenchSession,
    workload: Sequence[TraceRequest],
    policies: Sequence[str],
    targets: Mapping[str, AttainmentCriterion],
    isolated: IsolatedLatency,
    *,
    rates: Mapping[str, float] | None = None,
    rounds: int = 1,
    seed: int = 0,
    on_run: Callable[[PolicyRun], None] | None = None,
    on_record: Callable[[str, int], AbstractContextManager[OnRecord | None]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    timeline: Timeline | None = None,
) -> list[PolicyRun]:
    """Runs the policies in turn in each round: A B A B.

    Ctrl-C ends the comparison; complete runs and the finished part of the current run are kept.

    Args:
      session: the fleet.
      workload: the requests of every run.
      policies: policies to compare.
      targets: latency targets by model, for the schedulers and the metrics.
      isolated: isolated latencies, which targets are multiples of, and initial step times.
      rates: expected requests per second by model; None: the rates in the fleet file.
      rounds: runs of each policy.
      seed: seed of the prompts.
      on_run: called with each run when it ends.
      on_record: opens a consumer of the records of a policy and round.
      progress: called with policy, round and the number of requests that ended since
        the last call.
      timeline: records the steps of all runs.

    Returns:
      The runs; the last one is incomplete if its `replay.interrupted` is not 0.
    """
    vocab = {name: model.config.vocab_size for name, model in session.models.items()}
    limits = {name: model.max_model_len for name, model in session.models.items()}
    slos = scheduler_targets(session, targets, isolated)
    runs: list[PolicyRun] = []
    for index in range(rounds):
        for policy in policies:
            scheduler = session.new_scheduler(policy, isolated.estimates, slos, rates)
            requests = build_requests(workload, vocab, limits, seed)
            opened = nullcontext(None) if on_record is None else on_record(policy, index)
            with opened as write, session.engine(scheduler) as engine:
                if timeline is not None:
                    name = policy if rounds == 1 else f"{policy}, round {index + 1}"
                    engine.observe(timeline.observer(name))
                on_done = None if progress is None else partial(progress, policy, index)
                result = replay(engine, workload, requests, unit=policy, done=on_done)
                metrics = SimulationMetrics(targets, isolated.costs)
                for record in result.records:
                    met = metrics.add(record)
                    if write is not None:
                        write(record, met)
            run = PolicyRun(
                policy, index, extra_metrics(metrics.summary(), workload, result), result
            )
            runs.append(run)
            if on_run is not None:
                on_run(run)
            if result.interrupted:
                return runs
    return runs


def scheduler_targets(
    session: BenchSession, targets: Mapping[str, AttainmentCriterion], isolated: IsolatedLatency
) -> dict[str, LatencySlo]:
    """The latency targets of the schedulers for given targets of the metrics."""
    slos = {}
    for name, target in targets.items():
        spec = session.specs[name]
        slos[name] = target.scheduler_slo(spec.load, isolated.costs)
    return slos


def extra_metrics(
    summary: dict[str, Any], workload: Sequence[TraceRequest], result: Replay
) -> dict[str, Any]:
    """The metrics of a run with these additions.

    - `rate_weighted_goodput`: for each model, requests that met their target per second until the
      workload's last arrival, weighted by the model's share of all requests, summed. The time is
      the same for all policies.
    - `jain_index`: Jain's fairness index of the models' SLO attainment.
    - `interrupted`, `late_s`: from the replay.
    """
    span = max(entry.arrival for entry in workload) or 1.0
    models = summary["models"]
    total = max(1, sum(model["requests"] for model in models.values()))
    weighted = 0.0
    for model in models.values():
        met = (model["slo_attainment"] or 0.0) * model["requests"]
        weighted += model["requests"] / total * met / span
    attained = [m["slo_attainment"] for m in models.values() if m["slo_attainment"] is not None]
    return {
        **summary,
        "rate_weighted_goodput": weighted,
        "jain_index": jain_index(attained),
        "interrupted": result.interrupted,
        "late_s": result.late,
    }


def medians(runs: Sequence[PolicyRun], policies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The median, minimum and maximum of each metric over the complete rounds of each policy."""
    summaries: dict[str, dict[str, Any]] = {}
    for policy in policies:
        metrics_of_runs = [
            r.metrics for r in runs if r.policy == policy and not r.replay.interrupted
        ]
        if not metrics_of_runs:
            continue
        summary: dict[str, Any] = {"rounds": len(metrics_of_runs)}
        for key in HEADLINES:
            summary[key] = _spread([metrics[key] for metrics in metrics_of_runs])
        for key in _LATENCIES:
            for part in metrics_of_runs[0][key]:
                summary[f"{key}_{part}"] = _spread(
                    [metrics[key][part] for metrics in metrics_of_runs]
                )
        summaries[policy] = summary
    return summaries


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": median(known), "lowest": min(known), "highest": max(known)}
