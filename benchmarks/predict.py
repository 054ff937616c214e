"""The simulator against the real engine: the same workloads, one after the other.

    python benchmarks/predict.py
    python benchmarks/predict.py --fleet examples/demo.yaml --duration 60 --json

Measures the steps of a fleet (`muxjax bench steps`), then replays workloads that the profile was
not made from on the real engine, each followed by its simulation on that profile, and prints what
was simulated as a ratio to what was real: 1 is a perfect prediction. The bars are throughput within
10 %, and the median and the 99th percentile of the time to the first token within 25 %.

The same workload does not take the same time twice: it is replayed `--replays` times, what is real
is the median, and `apart` is the slowest replay over the fastest, which no prediction can be better
than. The profile is measured again before each round, since a shared machine's speed drifts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _common import print_json, show, surroundings

from muxjax.bench.host_time import add_host_times
from muxjax.bench.predict import simulate_rig
from muxjax.bench.profile_file import profile_of
from muxjax.bench.replay import make_requests, replay
from muxjax.bench.rig import Rig
from muxjax.bench.solo import warm_up
from muxjax.bench.steps import measure
from muxjax.bench.workloads import Asked, make_workload
from muxjax.config import load_fleet_config
from muxjax.placement.profile_table import ProfileTable
from muxjax.placement.records import RequestRecord
from muxjax.planning import shape_of

HERE = Path(__file__).parent
BARS = {"throughput": 0.10, "ttft_p50": 0.25, "ttft_p99": 0.25}
WORKLOADS = {
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
    parser.add_argument("--duration", type=float, default=12.0, help="seconds of each workload")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--replays", type=int, default=3, help="of each workload: medians")
    parser.add_argument("--repeats", type=int, default=7, help="of each kind of step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with Rig.load(load_fleet_config(arguments.fleet)) as rig:
        try:
            for number in range(arguments.rounds):
                rows += one_round(rig, arguments, number)
        except KeyboardInterrupt:
            print("interrupted: what follows is finished", file=sys.stderr)
    report(rows, arguments)
    if any(not row["within"] for row in rows):
        sys.exit(1)


def one_round(rig: Rig, arguments: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    """Profile, then every workload, real and simulated."""
    measured = measure(rig, repeats=arguments.repeats)
    add_host_times(rig, measured)
    limits = {entry.name: rig.specs[entry.name].limits for entry in rig.config.models}
    longest = {name: model.max_model_len for name, model in rig.models.items()}
    times = {name: measured.times(name) for name in rig.models}
    shapes = {
        name: shape_of(model.config, weight_bits=32.0, embed_bits=32.0, kv_bits=32.0)
        for name, model in rig.models.items()
    }
    profile = ProfileTable(profile_of(times, limits, longest), shapes)
    estimates = warm_up(rig)
    vocab = {name: model.config.vocab_size for name, model in rig.models.items()}

    def make(asked: dict[str, Any], rate: float) -> Any:
        asked = {key: value for key, value in asked.items() if key != "load"}
        wanted = Asked(
            **asked, rate=rate, seconds=arguments.duration, seed=arguments.seed + 100 * number
        )
        return make_workload(rig.config, longest, wanted)

    # What saturates, by the simulator: everything at once.
    flood = make({"kind": "poisson"}, 200.0 / arguments.duration)
    flood = [type(asked)(0.0, *_rest(asked)) for asked in flood]
    top = figures(simulate_rig(rig, profile, flood, arguments.policy, estimates))["throughput"]
    rows = []
    for name, asked in WORKLOADS.items():
        workload = make(asked, asked["load"] * top)
        replays = []
        for _ in range(arguments.replays):
            with rig.engine(rig.unit(arguments.policy, estimates)) as engine:
                requests = make_requests(workload, vocab, longest, number)
                done = replay(engine, workload, requests)
            if done.interrupted:
                raise KeyboardInterrupt
            replays.append(figures(done.records))
        real = {key: median(one[key] for one in replays) for key in replays[0]}
        apart = {
            key: max(one[key] for one in replays) / min(one[key] for one in replays) for key in real
        }
        predicted = figures(simulate_rig(rig, profile, workload, arguments.policy, estimates))
        ratios = {key: predicted[key] / real[key] for key in real}
        rows.append(
            {
                "round": number + 1,
                "workload": name,
                "requests": len(workload),
                "real": real,
                "simulated": predicted,
                "ratio": ratios,
                "replays_apart": apart,
                "within": all(abs(ratios[key] - 1) <= bar for key, bar in BARS.items()),
            }
        )
    return rows


def _rest(asked: Any) -> tuple[Any, ...]:
    return asked.model, asked.prompt_tokens, asked.output_tokens


def figures(records: list[RequestRecord]) -> dict[str, float]:
    """Throughput (requests/s to the last one's end) and times to the first token, in seconds."""
    ttft = [record.ttft for record in records]
    latency = [record.latency for record in records]
    return {
        "throughput": len(records) / max(record.end or 0.0 for record in records),
        "ttft_p50": float(np.percentile(ttft, 50)),
        "ttft_p99": float(np.percentile(ttft, 99)),
        "latency_p50": float(np.percentile(latency, 50)),
        "latency_p99": float(np.percentile(latency, 99)),
    }


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
            "TTFT p99 apart": row["replays_apart"]["ttft_p99"],
            "within": "yes" if row["within"] else "NO",
        }
        for row in rows
    ]
    if table:
        show("simulated / real", tuple(table[0]), table, policy=arguments.policy)


if __name__ == "__main__":
    main()
