"""Several policies on one workload, in turn, round by round, on the real engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from muxjax.bench.isolated import IsolatedLatency
from muxjax.bench.replay import Replay, make_requests, replay
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
"""Keys that are summed up over rounds, besides latencies."""
_LATENCIES = ("ttft_s", "tpot_s", "latency_s")


@dataclass(frozen=True)
class PolicyRun:
    """One policy's run in one round.

    Attributes:
      policy, round: which.
      metrics: keys of `placement.metrics`, and those of `extra_metrics`.
      replay: the run itself.
    """

    policy: str
    round: int
    metrics: dict[str, Any]
    replay: Replay


def compare(
    rig: BenchSession,
    workload: Sequence[TraceRequest],
    policies: Sequence[str],
    targets: Mapping[str, AttainmentCriterion],
    solo: IsolatedLatency,
    *,
    rates: Mapping[str, float] | None = None,
    rounds: int = 1,
    seed: int = 0,
    on_run: Callable[[PolicyRun], None] | None = None,
    on_record: Callable[[str, int], AbstractContextManager[OnRecord | None]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    timeline: Timeline | None = None,
) -> list[PolicyRun]:
    """Runs the policies in turn, as often as there are rounds: A B A B.

    Ctrl-C ends it; complete runs are kept, and so is the one under way as far as it came.

    Args:
      rig: the fleet.
      workload: the same for all runs.
      policies: what to compare.
      targets: of each model: what is counted, and what schedulers work towards.
      solo: what targets are multiples of, and the step times that schedulers begin with.
      rates: requests a second that schedulers expect of each model; None: the fleet file's.
      rounds: runs of each policy.
      seed: of the prompts.
      on_run: told each run as it ends.
      on_record: opens, for a policy and a round, what takes its records.
      progress: told policy, round and how many requests have ended since.
      timeline: records the steps of all runs.

    Returns:
      The runs; the last one is not complete if its `replay.interrupted` is not 0.
    """
    vocab = {name: model.config.vocab_size for name, model in rig.models.items()}
    limits = {name: model.max_model_len for name, model in rig.models.items()}
    asked = scheduler_targets(rig, targets, solo)
    runs: list[PolicyRun] = []
    for index in range(rounds):
        for policy in policies:
            unit = rig.unit(policy, solo.estimates, asked, rates)
            requests = make_requests(workload, vocab, limits, seed)
            opened = nullcontext(None) if on_record is None else on_record(policy, index)
            with opened as take, rig.engine(unit) as engine:
                if timeline is not None:
                    name = policy if rounds == 1 else f"{policy}, round {index + 1}"
                    engine.observe(timeline.observer(name))
                told = None if progress is None else partial(progress, policy, index)
                result = replay(engine, workload, requests, unit=policy, done=told)
                metrics = SimulationMetrics(targets, solo.costs)
                for record in result.records:
                    met = metrics.add(record)
                    if take is not None:
                        take(record, met)
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
    rig: BenchSession, targets: Mapping[str, AttainmentCriterion], solo: IsolatedLatency
) -> dict[str, LatencySlo]:
    """What schedulers work towards where these targets are counted."""
    found = {}
    for name, target in targets.items():
        found[name] = target.scheduler_slo(rig.specs[name].load, solo.costs)
    return found


def extra_metrics(
    summary: dict[str, Any], workload: Sequence[TraceRequest], result: Replay
) -> dict[str, Any]:
    """Adds to the metrics of a run.

    - `rate_weighted_goodput`: for each model, requests that met their target over the time from the
      start to the workload's last arrival, weighted by the model's part of the requests offered;
      added up. The time is the same for all policies.
    - `jain_index`: Jain's index over the models' parts of requests that met their target.
    - `interrupted`, `late_s`: of the replay.
    """
    span = max(asked.arrival for asked in workload) or 1.0
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
    """For each policy and key the median, the lowest and the highest of its complete rounds."""
    found: dict[str, dict[str, Any]] = {}
    for policy in policies:
        own = [r.metrics for r in runs if r.policy == policy and not r.replay.interrupted]
        if not own:
            continue
        summary: dict[str, Any] = {"rounds": len(own)}
        for key in HEADLINES:
            summary[key] = _spread([metrics[key] for metrics in own])
        for key in _LATENCIES:
            for part in own[0][key]:
                summary[f"{key}_{part}"] = _spread([metrics[key][part] for metrics in own])
        found[policy] = summary
    return found


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": median(known), "lowest": min(known), "highest": max(known)}
