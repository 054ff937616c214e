"""Compares the simulator with the real engine on the same workloads.

The steps of a fleet are measured, as by `muxjax bench steps`. Other workloads are then replayed on
the real engine, and each is simulated with the measured step times. A simulated-to-real ratio of 1
is a perfect prediction. Throughput must be within 10 %, and the median and 99th percentile of the
time to first token within 25 % (`TOLERANCES`).

- Each workload is replayed several times, each time with different arrivals and lengths, and
  simulated with the same ones; percentiles are over the requests of all replays.
- The speed of a shared machine varies. A short mixed run before and after each replay measures how
  long steps take compared with the profile (`slowdown`), and the simulation scales its steps
  accordingly, unless `fixed_speed` is set.
- If these two measurements, or the slowdowns of the four quarters of the replay's steps, differ
  by more than `STEADY`, the speed changed during the replay. The replay is then repeated, up to as
  many times as there are replays (`unsteady`). Loads are fractions of the saturating rate at the
  measured speed.
- `steps` is the expected duration of the replays' steps over their real duration. If it is far from
  1, the speed changed or the step times are wrong. If it is near 1 and another ratio is not, the
  simulation is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np

from muxjax.bench.isolated import warm_up
from muxjax.bench.replay import build_requests, replay
from muxjax.bench.session import BenchSession
from muxjax.bench.simulated_session import session_profile, simulate_session
from muxjax.bench.step_recorder import (
    FEWEST,
    ExecutedStep,
    StepRecorder,
    measure_in_service,
    slowness,
    speed_now,
)
from muxjax.bench.workloads import WorkloadOptions, build_workload
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.workload.trace import TraceRequest

TOLERANCES = {"throughput": 0.10, "ttft_p50": 0.25, "ttft_p99": 0.25}
STEADY = 1.15
"""Largest ratio between the slowest and the fastest part of a replay that counts."""
BURST_REQUESTS = 200.0
"""Requests of the burst that measures the saturating rate."""
WORKLOADS: dict[str, dict[str, Any]] = {
    "poisson, half load": {"kind": "poisson", "load": 0.5},
    "poisson, three quarters": {"kind": "poisson", "load": 0.75},
    "skewed, bursty": {"kind": "gamma", "load": 0.6, "alpha": 2.1, "cv": 3.0},
    "long prompts": {"kind": "poisson", "load": 0.6, "prompt_tokens": 100.0},
    "overload": {"kind": "poisson", "load": 1.3, "alpha": 0.7},
}


@dataclass(frozen=True)
class PredictionOptions:
    """Options of a comparison.

    Attributes:
      policy: the scheduling policy.
      workloads: names from `WORKLOADS`.
      seconds: length of each workload.
      rounds: number of times to measure a profile and run all workloads.
      replays: replays of each workload in a round.
      repeats: measurements of each kind of step.
      fixed_speed: do not measure the machine's speed around each replay.
      seed: seed of the first replay.
    """

    policy: str = "adbs"
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    seconds: float = 12.0
    rounds: int = 1
    replays: int = 3
    repeats: int = 7
    fixed_speed: bool = False
    seed: int = 1


@dataclass(frozen=True)
class ReplayPair:
    """A replay and its simulation.

    Attributes:
      real, simulated: the records of the requests.
      before, after: slowdown before and after the replay, relative to the profile.
      quarters: slowdown in each quarter of the replay's steps.
      expected, measured: expected and measured seconds of all steps of the replay.
    """

    real: list[RequestRecord]
    simulated: list[RequestRecord]
    before: float
    after: float
    quarters: list[float]
    expected: float
    measured: float

    @property
    def slowdown(self) -> float:
        return (self.before + self.after) / 2

    @property
    def steady(self) -> bool:
        """Whether the speed of the machine was constant."""
        speeds = [self.before, *self.quarters, self.after]
        return max(speeds) <= STEADY * min(speeds)


class PredictionBench:
    """A session whose steps are measured at construction."""

    def __init__(self, session: BenchSession, options: PredictionOptions) -> None:
        self._session, self._options = session, options
        self._measured = measure_in_service(session, repeats=options.repeats)
        self._times = {name: self._measured.times(name) for name in session.models}
        self._longest = {name: model.max_model_len for name, model in session.models.items()}
        self._profile = session_profile(session, self._measured)
        self._estimates = warm_up(session)

    def speed(self) -> float:
        """The current slowdown of steps, relative to the profile."""
        return 1.0 if self._options.fixed_speed else speed_now(self._session, self._measured)

    def run(self, workload_options: dict[str, Any], seed: int, before: float) -> ReplayPair:
        """Replays and simulates one workload.

        Args:
          workload_options: fields of `WorkloadOptions`, and `load`, the fraction of the saturating
            rate at the current speed.
          seed: seed of the requests.
          before: the slowdown that was measured last.
        """
        fields = dict(workload_options)
        rate = fields.pop("load") * self._saturating_rate(before)
        workload = self._build(fields, rate, seed)
        session, recorder = self._session, StepRecorder()
        vocab = {name: model.config.vocab_size for name, model in session.models.items()}
        with session.engine(session.new_scheduler(self._options.policy, self._estimates)) as engine:
            engine.observe(recorder.observe)
            requests = build_requests(workload, vocab, self._longest, seed)
            done = replay(engine, workload, requests)
        if done.interrupted:
            raise KeyboardInterrupt
        after = self.speed()
        slowdown = (before + after) / 2
        expected = slowdown * sum(step.expected(self._times) for step in recorder.ran)
        measured = sum(step.seconds for step in recorder.ran)
        simulated = self._simulate(workload, slowdown)
        parts = [part for part in split_quarters(recorder.ran) if len(part) >= FEWEST]
        quarters = [slowness(part, self._times) for part in parts]
        return ReplayPair(done.records, simulated, before, after, quarters, expected, measured)

    def _saturating_rate(self, slowdown: float) -> float:
        """Simulated requests per second when a burst arrives at once."""
        seed, seconds = self._options.seed, self._options.seconds
        burst = self._build({"kind": "poisson"}, BURST_REQUESTS / seconds, seed)
        at_once = [replace(entry, arrival=0.0) for entry in burst]
        return throughput(self._simulate(at_once, slowdown))

    def _build(self, fields: dict[str, Any], rate: float, seed: int) -> list[TraceRequest]:
        options = WorkloadOptions(**fields, rate=rate, seconds=self._options.seconds, seed=seed)
        return build_workload(self._session.config, self._longest, options)

    def _simulate(self, workload: list[TraceRequest], slowdown: float) -> list[RequestRecord]:
        return simulate_session(
            self._session,
            self._profile,
            workload,
            self._options.policy,
            self._estimates,
            slowdown=slowdown,
        )


def run_round(
    session: BenchSession, options: PredictionOptions, number: int
) -> Iterator[dict[str, Any]]:
    """Measures a profile, then replays and simulates every workload."""
    bench = PredictionBench(session, options)
    for name in options.workloads:
        pairs: list[ReplayPair] = []
        unsteady = 0
        speed = bench.speed()
        while len(pairs) < options.replays:
            seed = options.seed + 100 * number + len(pairs)
            pair = bench.run(WORKLOADS[name], seed, speed)
            speed = pair.after
            if pair.steady or unsteady >= options.replays:
                pairs.append(pair)
            else:
                unsteady += 1
        yield summary_row(number, name, pairs, unsteady)


def summary_row(number: int, name: str, pairs: list[ReplayPair], unsteady: int) -> dict[str, Any]:
    """The report of one workload."""
    real, simulated = [p.real for p in pairs], [p.simulated for p in pairs]
    ratios = _ratios(simulated, real)
    return {
        "round": number + 1,
        "workload": name,
        "requests": sum(len(records) for records in real),
        "real": run_statistics(real),
        "simulated": run_statistics(simulated),
        "ratio": ratios,
        "replays": [_ratios([p.simulated], [p.real]) for p in pairs],
        "slowdown": [p.slowdown for p in pairs],
        "unsteady": unsteady,
        "steps": sum(p.expected for p in pairs) / sum(p.measured for p in pairs),
        "within": all(abs(ratios[key] - 1) <= limit for key, limit in TOLERANCES.items()),
    }


def split_quarters(ran: list[ExecutedStep]) -> list[list[ExecutedStep]]:
    """Splits steps into four parts of equal duration."""
    ends = np.cumsum([step.seconds for step in ran])
    quarter = np.minimum(3, (4 * ends / ends[-1]).astype(int))
    return [
        [step for step, part in zip(ran, quarter, strict=True) if part == index]
        for index in range(4)
    ]


def run_statistics(runs: list[list[RequestRecord]]) -> dict[str, float]:
    """Mean throughput of runs of one workload, and percentiles over all requests of TTFT and
    latency in seconds.
    """
    ttft = [r.ttft for records in runs for r in records if r.ttft is not None]
    latency = [r.latency for records in runs for r in records if r.latency is not None]
    return {
        "throughput": mean(throughput(records) for records in runs),
        "ttft_p50": float(np.percentile(ttft, 50)),
        "ttft_p99": float(np.percentile(ttft, 99)),
        "latency_p50": float(np.percentile(latency, 50)),
        "latency_p99": float(np.percentile(latency, 99)),
    }


def throughput(records: list[RequestRecord]) -> float:
    """Requests per second until the end of the last one."""
    return len(records) / max(record.end or 0.0 for record in records)


def _ratios(
    simulated: list[list[RequestRecord]], real: list[list[RequestRecord]]
) -> dict[str, float]:
    predicted, measured = run_statistics(simulated), run_statistics(real)
    return {key: predicted[key] / measured[key] for key in measured}


def median_ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The medians over the rounds of each workload's ratios."""
    medians: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["workload"] for row in rows):
        ratios = [row["ratio"] for row in rows if row["workload"] == name]
        medians[name] = {key: median(ratio[key] for ratio in ratios) for key in ratios[0]}
    return medians


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `run_round` for a table."""
    return [
        {
            "round": row["round"],
            "workload": row["workload"],
            "requests": row["requests"],
            "real req/s": row["real"]["throughput"],
            "real TTFT p50 ms": 1e3 * row["real"]["ttft_p50"],
            "real TTFT p99 ms": 1e3 * row["real"]["ttft_p99"],
            **{f"{key} sim/real": row["ratio"][key] for key in TOLERANCES},
            "slowdown": f"{min(row['slowdown']):.2f} to {max(row['slowdown']):.2f}",
            "unsteady": row["unsteady"],
            "steps": row["steps"],
            "within limits": "yes" if row["within"] else "NO",
        }
        for row in rows
    ]
