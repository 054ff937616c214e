"""The simulator against the real engine: the same workloads, one after the other.

    python benchmarks/predict.py
    python benchmarks/predict.py --fleet examples/demo.yaml --duration 60 --json

Measures the steps of a fleet (`muxjax bench steps`), then replays workloads that the profile was
not made from on the real engine, each followed by its simulation on that profile, and prints what
was simulated as a ratio to what was real: 1 is a perfect prediction. The bars are throughput within
10 %, and the median and the 99th percentile of the time to the first token within 25 %.

- Each workload is replayed `--replays` times with arrivals and lengths of their own, and simulated
  with the same; percentiles are those of all its requests. Of 200 requests the 99th percentile is
  the second or third slowest, which says little.
- A shared machine is half as fast at one time as at another. Before and after each replay a mixed
  run of some seconds, the one that `bench steps` has, says how long steps take now against
  the profile's (`slower`), and the simulation's steps take as much longer. `--fixed` leaves that
  out.
- Where these two, or what the steps of the four quarters of the replay took over what they were
  expected to, are more than 15 % apart, the machine changed during the replay: it is made again, as
  often in all as there are replays (`unsteady`). On a quiet machine the quarters were 3 to 6 %
  apart, and 20 to 60 % where something else ran for some seconds. Loads are parts of what
  saturates the machine as it is then.
- `steps` is what the steps of the replays were expected to take over what they took, whatever the
  simulation made of it: where it is not near 1, the machine changed during the replay, or the step
  times are wrong; where it is, and another ratio is not, the simulation is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from _common import print_json, show, surroundings

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
from muxjax.config.fleet_file import load_fleet_config
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.workload.trace import TraceRequest

HERE = Path(__file__).parent
BARS = {"throughput": 0.10, "ttft_p50": 0.25, "ttft_p99": 0.25}
STEADY = 1.15
"""How unlike the machine may be at different times of a replay that counts."""
FLOOD = 200.0
"""Requests that find out what saturates."""
WORKLOADS: dict[str, dict[str, Any]] = {
    "poisson, half load": {"kind": "poisson", "load": 0.5},
    "poisson, three quarters": {"kind": "poisson", "load": 0.75},
    "skewed, bursty": {"kind": "gamma", "load": 0.6, "alpha": 2.1, "cv": 3.0},
    "long prompts": {"kind": "poisson", "load": 0.6, "prompt_tokens": 100.0},
    "overload": {"kind": "poisson", "load": 1.3, "alpha": 0.7},
}


def main() -> None:
    """Measures and prints; exit status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Compare the simulator with the real engine.")
    parser.add_argument("--fleet", type=Path, default=HERE / "three.yaml")
    parser.add_argument("--policy", default="adbs")
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="default: all")
    parser.add_argument("--duration", type=float, default=12.0, help="seconds of each workload")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--replays", type=int, default=3, help="of each workload")
    parser.add_argument("--repeats", type=int, default=7, help="of each kind of step")
    parser.add_argument("--fixed", action="store_true", help="step times stay the profile's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with BenchSession.load(load_fleet_config(arguments.fleet)) as session:
        try:
            for number in range(arguments.rounds):
                for row in one_round(session, arguments, number):
                    rows.append(row)
        except KeyboardInterrupt:
            print("interrupted: what follows is finished", file=sys.stderr)
    report(rows, arguments)
    if any(not row["within"] for row in rows):
        sys.exit(1)


@dataclass(frozen=True)
class Pair:
    """A replay and its simulation.

    Attributes:
      real, simulated: what became of each request.
      before, after: how long steps took then, as a multiple of the profile's.
      quarters: the same of the replay's own steps.
      expected, taken: seconds of all steps of the replay, by the step times and in fact.
    """

    real: list[RequestRecord]
    simulated: list[RequestRecord]
    before: float
    after: float
    quarters: list[float]
    expected: float
    taken: float

    @property
    def slower(self) -> float:
        return (self.before + self.after) / 2

    @property
    def steady(self) -> bool:
        """Whether the machine was as fast all the time."""
        speeds = [self.before, *self.quarters, self.after]
        return max(speeds) <= STEADY * min(speeds)


class Bench:
    """A session with a profile of its own, measured now."""

    def __init__(self, session: BenchSession, arguments: argparse.Namespace) -> None:
        self._session, self._arguments = session, arguments
        self._measured = measure_in_service(session, repeats=arguments.repeats)
        self._times = {name: self._measured.times(name) for name in session.models}
        self._longest = {name: model.max_model_len for name, model in session.models.items()}
        self._profile = session_profile(session, self._measured)
        self._estimates = warm_up(session)

    def speed(self) -> float:
        """How long steps take now, as a multiple of the profile's."""
        return 1.0 if self._arguments.fixed else speed_now(self._session, self._measured)

    def run(self, asked: dict[str, Any], seed: int, before: float) -> Pair:
        """One replay, and what the simulator says of it.

        Args:
          asked: the workload; `load` is the part of what saturates the machine as it is now.
          seed: of its requests.
          before: the speed, just measured.
        """
        asked = dict(asked)
        rate = asked.pop("load") * self._saturating(before)
        workload = self._make(asked, rate, seed)
        session, watch = self._session, StepRecorder()
        vocab = {name: model.config.vocab_size for name, model in session.models.items()}
        with session.engine(
            session.new_scheduler(self._arguments.policy, self._estimates)
        ) as engine:
            engine.observe(watch.observe)
            requests = build_requests(workload, vocab, self._longest, seed)
            done = replay(engine, workload, requests)
        if done.interrupted:
            raise KeyboardInterrupt
        after = self.speed()
        slower = (before + after) / 2
        expected = slower * sum(step.expected(self._times) for step in watch.ran)
        taken = sum(step.seconds for step in watch.ran)
        simulated = self._simulate(workload, slower)
        parts = [part for part in quarters_of(watch.ran) if len(part) >= FEWEST]
        quarters = [slowness(part, self._times) for part in parts]
        return Pair(done.records, simulated, before, after, quarters, expected, taken)

    def _saturating(self, slower: float) -> float:
        """Requests/s of what the simulator makes of many at once."""
        seed, seconds = self._arguments.seed, self._arguments.duration
        flood = self._make({"kind": "poisson"}, FLOOD / seconds, seed)
        return throughput(self._simulate([replace(asked, arrival=0.0) for asked in flood], slower))

    def _make(self, asked: dict[str, Any], rate: float, seed: int) -> list[TraceRequest]:
        wanted = WorkloadOptions(**asked, rate=rate, seconds=self._arguments.duration, seed=seed)
        return build_workload(self._session.config, self._longest, wanted)

    def _simulate(self, workload: list[TraceRequest], slower: float) -> list[RequestRecord]:
        return simulate_session(
            self._session,
            self._profile,
            workload,
            self._arguments.policy,
            self._estimates,
            slower=slower,
        )


def one_round(
    session: BenchSession, arguments: argparse.Namespace, number: int
) -> Iterator[dict[str, Any]]:
    """Profile, then every workload, real and simulated."""
    bench = Bench(session, arguments)
    for name in arguments.workload or WORKLOADS:
        pairs: list[Pair] = []
        unsteady = 0
        speed = bench.speed()
        while len(pairs) < arguments.replays:
            seed = arguments.seed + 100 * number + len(pairs)
            pair = bench.run(WORKLOADS[name], seed, speed)
            speed = pair.after
            if pair.steady or unsteady >= arguments.replays:
                pairs.append(pair)
            else:
                unsteady += 1
        yield row_of(number, name, pairs, unsteady)


def row_of(number: int, name: str, pairs: list[Pair], unsteady: int) -> dict[str, Any]:
    """What is reported of one workload."""
    real, simulated = [p.real for p in pairs], [p.simulated for p in pairs]
    ratios = _ratios(simulated, real)
    return {
        "round": number + 1,
        "workload": name,
        "requests": sum(len(records) for records in real),
        "real": figures(real),
        "simulated": figures(simulated),
        "ratio": ratios,
        "replays": [_ratios([p.simulated], [p.real]) for p in pairs],
        "slower": [p.slower for p in pairs],
        "unsteady": unsteady,
        "steps": sum(p.expected for p in pairs) / sum(p.taken for p in pairs),
        "within": all(abs(ratios[key] - 1) <= bar for key, bar in BARS.items()),
    }


def quarters_of(ran: list[ExecutedStep]) -> list[list[ExecutedStep]]:
    """Steps in four parts that took as long."""
    ends = np.cumsum([step.seconds for step in ran])
    which = np.minimum(3, (4 * ends / ends[-1]).astype(int))
    return [[s for s, part in zip(ran, which, strict=True) if part == each] for each in range(4)]


def figures(runs: list[list[RequestRecord]]) -> dict[str, float]:
    """Of runs of one workload: the mean throughput, and percentiles over all requests of the times
    to the first token and to the last, in seconds.
    """
    ttft = [record.ttft for records in runs for record in records]
    latency = [record.latency for records in runs for record in records]
    return {
        "throughput": mean(throughput(records) for records in runs),
        "ttft_p50": float(np.percentile(ttft, 50)),
        "ttft_p99": float(np.percentile(ttft, 99)),
        "latency_p50": float(np.percentile(latency, 50)),
        "latency_p99": float(np.percentile(latency, 99)),
    }


def throughput(records: list[RequestRecord]) -> float:
    """Requests/s until the last one's end."""
    return len(records) / max(record.end or 0.0 for record in records)


def _ratios(
    simulated: list[list[RequestRecord]], real: list[list[RequestRecord]]
) -> dict[str, float]:
    predicted, found = figures(simulated), figures(real)
    return {key: predicted[key] / found[key] for key in found}


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Prints all ratios, and their medians over the rounds."""
    middles = {}
    for name in dict.fromkeys(row["workload"] for row in rows):
        own = [row["ratio"] for row in rows if row["workload"] == name]
        middles[name] = {key: median(ratio[key] for ratio in own) for key in own[0]}
    if arguments.json:
        print_json({**surroundings(), "bars": BARS, "rows": rows, "medians": middles})
        return
    table = [
        {
            "round": row["round"],
            "workload": row["workload"],
            "requests": row["requests"],
            "real req/s": row["real"]["throughput"],
            "real TTFT p50 ms": 1e3 * row["real"]["ttft_p50"],
            "real TTFT p99 ms": 1e3 * row["real"]["ttft_p99"],
            **{f"{key} sim/real": row["ratio"][key] for key in BARS},
            "slower": f"{min(row['slower']):.2f} to {max(row['slower']):.2f}",
            "unsteady": row["unsteady"],
            "steps": row["steps"],
            "within": "yes" if row["within"] else "NO",
        }
        for row in rows
    ]
    if table:
        show("simulated / real", tuple(table[0]), table, policy=arguments.policy)


if __name__ == "__main__":
    main()
