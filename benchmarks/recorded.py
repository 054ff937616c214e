"""Simulates MuxServe's recorded runs and compares the ratios between its systems.

    python benchmarks/recorded.py DIR [--profile FILE] [--json]

`DIR` contains `recorded.json` and a fleet `CASE.yaml` for each case (as in
`../shared/data/chatlmsys`). For each case, three systems are simulated on the recorded meshes and
compute shares, with the measured A100 profile:

- muxserve: Algorithm 3, concurrent programs, pool with quotas;
- spatial: one model per mesh, prefill and decode alternating;
- temporal: MuxServe's meshes, one program at a time, first come first served, no quotas.

The trace is not public, so requests are generated: for each model the recorded number, at random
times over `requests / rate` seconds (uniform), with log-normal lengths. The mean length is the
recorded tokens/s over requests/s, divided into prompt and output like the averages of the fleet.
Results are averaged over seeds.

Other settings are from MuxServe's repository (hao-ai-lab/MuxServe): steps of up to 2,048 prompt
tokens and of one decode token, at most 256 sequences of a model without quotas, and the memory of
the pool (`PROCESSES`, `SPATIAL_POOL`). No setting was fitted to the recorded throughputs.

The fairness experiment (Duan et al., ICML 2024, section 4.4, figure 9b) is simulated as well: LLaMA
65B with long requests and LLaMA 30B with short ones, lengths 4:1, rates 1:8, on four devices. It
compares `adbs` with `round_robin` and `fcfs`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from muxjax.placement.costs.devices import find_device
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.planner.plan import Execution, PlannedModel, PlannedUnit
from muxjax.placement.simulator.metrics import AttainmentCriterion, SimulationMetrics
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_units import (
    PolicyName,
    StepSizes,
    SystemConfig,
    build_simulated_unit,
)
from muxjax.placement.simulator.simulator import Simulation
from muxjax.placement.workload.lengths import LogNormal, Uniform
from muxjax.placement.workload.synthetic import SyntheticWorkload, Traffic
from muxjax.placement.workload.trace import TraceRequest
from muxjax.progress import Bars

SystemName = Literal["muxserve", "spatial", "temporal"]
SYSTEMS: Mapping[SystemName, SystemConfig] = {
    "muxserve": SystemConfig("adbs", "concurrent"),
    "spatial": SystemConfig("adbs", "concurrent"),
    "temporal": SystemConfig("temporal", "time_sliced", StepSizes(decode_tokens=1)),
}
MEASURES = {
    "total": ("total_throughput", "total_throughput"),
    "weighted": ("request_weighted_throughput", "rate_weighted_throughput"),
}
SEEDS = 2

DEVICE = find_device("a100-80gb")
MAX_PROMPT, MAX_OUTPUT = 1024, 1024
"""MuxServe dropped prompts of more than 1,024 tokens and requests of more than 2,048
(benchmark/chatlmsys/chatlmsys_translation.py)."""
MAX_SEQS = 256
"""`max_num_seqs` of systems without quotas."""
NO_LIMIT = 2048

PROCESSES = 2 * 0.8e9 + 6e9
"""Bytes that MuxServe reserves for each model of a mesh: two processes and the activations
(muxserve/muxsched/placement.py, update_utilization). The pool is the memory that remains."""
SPATIAL_POOL = {"7b": 0.65, "13b": 0.5, "30b": 0.375, "65b": 0.375}
"""Pool size as a fraction of memory in the spatial runs
(benchmark/chatlmsys/muxserve2spatial.py)."""


@dataclass(frozen=True)
class Case:
    """One recorded case.

    Attributes:
      name: key in recorded.json.
      recorded: the recorded run of each system.
      kinds, rates: kind and rate of each model.
      prompts, outputs: mean tokens of each model.
    """

    name: str
    recorded: Mapping[SystemName, Any]
    kinds: Mapping[str, str]
    rates: Mapping[str, float]
    prompts: Mapping[str, float]
    outputs: Mapping[str, float]

    def requests(self, system: SystemName, seed: int) -> list[TraceRequest]:
        """The trace, which is the same for all systems: their numbers of requests are equal."""
        requests: list[TraceRequest] = []
        for index, name in enumerate(self.kinds):
            count = self.recorded[system]["models"][name]["requests"]
            rng = np.random.default_rng([seed, index])
            times = np.sort(rng.uniform(0, count / self.rates[name], count)).tolist()
            lengths = LogNormal(
                self.prompts[name],
                self.outputs[name],
                max_prompt=MAX_PROMPT,
                max_output=MAX_OUTPUT,
            ).draw(rng)
            for time, (prompt, output) in zip(times, lengths, strict=False):
                requests.append(TraceRequest(time, name, prompt, output))
        return sorted(requests, key=lambda request: request.arrival)


def read_cases(folder: Path) -> list[Case]:
    """All cases of a folder."""
    recorded = json.loads((folder / "recorded.json").read_text())
    cases = []
    for name, systems in recorded.items():
        fleet = yaml.safe_load((folder / f"{name}.yaml").read_text())
        runs = systems["muxserve"]["models"]
        prompt, output = fleet["avg_prompt_len"], fleet["avg_output_len"]
        tokens = {m: runs[m]["tokens_per_s"] / runs[m]["throughput"] for m in runs}
        cases.append(
            Case(
                name,
                {system: systems[system] for system in SYSTEMS},
                {model["name"]: runs[model["name"]]["model"] for model in fleet["models"]},
                {model["name"]: model["rate"] for model in fleet["models"]},
                {m: t * prompt / (prompt + output) for m, t in tokens.items()},
                {m: t * output / (prompt + output) for m, t in tokens.items()},
            )
        )
    return cases


def planned_units(case: Case, system: SystemName, costs: ProfileTable) -> Iterator[PlannedUnit]:
    """The recorded meshes of a system."""
    runs = case.recorded[system]["models"]
    meshes: dict[str, list[str]] = defaultdict(list)
    for name in case.kinds:
        meshes[runs[name]["mesh"]].append(name)
    for mesh, names in meshes.items():
        tp = int(mesh.split("x")[0])
        weights = sum(costs.weight_bytes(case.kinds[name], tp=tp) for name in names)
        if system == "spatial":
            pool = SPATIAL_POOL[case.kinds[names[0]].split("-")[1]] * DEVICE.memory
        else:
            pool = DEVICE.memory - weights - PROCESSES * len(names)
        models = [
            PlannedModel(
                name=name,
                kind=case.kinds[name],
                rate=case.rates[name],
                prompt_tokens=case.prompts[name],
                output_tokens=case.outputs[name],
                tp=tp,
                prefill_share=runs[name]["sm_percent"][0] / 100,
                decode_share=runs[name]["sm_percent"][1] / 100,
                max_batch=NO_LIMIT if system == "muxserve" else MAX_SEQS,
            )
            for name in names
        ]
        yield unit(mesh, tp, weights, pool, models)


def unit(
    name: str, size: int, weights: float, pool: float, models: Sequence[PlannedModel]
) -> PlannedUnit:
    """A unit on the first devices of a node; results do not depend on the position."""
    return PlannedUnit(
        name=name,
        node=0,
        device=DEVICE.name,
        devices=tuple(range(size)),
        weight_bytes=weights,
        reserved_bytes=DEVICE.memory - weights - pool,
        kv_bytes=pool,
        throughput=0.0,
        models=tuple(models),
    )


def simulate(
    units: Sequence[PlannedUnit],
    system: SystemConfig,
    requests: Sequence[TraceRequest] | SyntheticWorkload,
    costs: ProfileTable,
) -> dict[str, Any]:
    """Returns the metrics of one run."""
    shapes = {kind: costs.shape(kind) for kind in costs.models}
    simulated = [
        build_simulated_unit(u, system, costs, shapes, bandwidth=DEVICE.bandwidth) for u in units
    ]
    metrics = SimulationMetrics(
        {m.name: AttainmentCriterion() for u in units for m in u.models}, costs
    )

    def add(record: RequestRecord) -> None:
        metrics.add(record)

    Simulation(simulated).run(requests, add)
    return metrics.summary()


def compare(case: Case, costs: ProfileTable, bars: Bars) -> dict[str, Any]:
    """Returns recorded and simulated throughputs of a case, and their ratios."""
    simulated: dict[str, dict[str, float]] = {}
    for name, system in SYSTEMS.items():
        runs = []
        for seed in range(SEEDS):
            units = list(planned_units(case, name, costs))
            runs.append(simulate(units, system, case.requests(name, seed), costs))
            bars.advance("simulating", 1, f"{case.name} {name}")
        simulated[name] = {
            measure: statistics.mean(run[key] for run in runs)
            for measure, (_, key) in MEASURES.items()
        }
    result: dict[str, Any] = {"simulated": simulated, "recorded": {}, "ratios": {}}
    for name in SYSTEMS:
        result["recorded"][name] = {
            measure: case.recorded[name][key] for measure, (key, _) in MEASURES.items()
        }
    for other in ("spatial", "temporal"):
        for measure in MEASURES:
            recorded, ratio = (
                result[source]["muxserve"][measure] / result[source][other][measure]
                for source in ("recorded", "simulated")
            )
            result["ratios"][f"muxserve/{other} {measure}"] = {
                "recorded": recorded,
                "simulated": ratio,
                "error": ratio / recorded - 1,
            }
    return result


# Fairness

PAPER_RATIOS = {"round_robin": 1.43, "fcfs": 1.85}
"""Throughput of `adbs` over each policy in section 4.4, mean of figures 9a and 9b."""
FAIR_RATES = {"llama-65b": 1.0, "llama-30b": 8.0}
FAIR_REQUESTS = 200
"""Requests of the most popular model (MuxServe's muxserve/muxsched/workload_utils.py)."""
LONG_TOKENS, SHORT_TOKENS = 1024, 256
"""Tokens of a request. The ratio 4:1 is from the paper, and 1,024 is the default of MuxServe's
generator."""
PROMPT_SHARES = (0.33, 0.5, 0.75)
"""Fraction of prompt tokens, which the paper does not give. The first is ShareGPT's (161 of 499);
the last is the generator's default (768 of 1,024)."""
FAIR_DEVICES = 4


def fairness(costs: ProfileTable, execution: Execution, bars: Bars) -> dict[str, Any]:
    """Returns the ratios of `adbs` to the baselines, for each prompt share and on average."""
    policies: tuple[PolicyName, ...] = ("adbs", "round_robin", "fcfs")
    result: dict[str, Any] = {"splits": {}}
    for prompt_share in PROMPT_SHARES:
        throughputs: dict[str, list[float]] = {policy: [] for policy in policies}
        for seed in range(SEEDS):
            for policy in policies:
                workload = _fair_workload(prompt_share, seed)
                system = SystemConfig(policy, execution)
                run = simulate([_fair_unit(prompt_share, costs)], system, workload, costs)
                throughputs[policy].append(run["rate_weighted_throughput"])
                bars.advance("simulating", 1, f"fairness {policy} {execution}")
        means = {policy: statistics.mean(values) for policy, values in throughputs.items()}
        result["splits"][f"{prompt_share:.2f} prompt"] = {
            "throughput": means,
            "ratios": {other: means["adbs"] / means[other] for other in PAPER_RATIOS},
        }
    result["ratios"] = {
        other: {
            "paper": paper,
            "simulated": (
                ratio := statistics.mean(s["ratios"][other] for s in result["splits"].values())
            ),
            "error": ratio / paper - 1,
        }
        for other, paper in PAPER_RATIOS.items()
    }
    return result


def _fair_lengths(prompt_share: float) -> dict[str, tuple[float, float]]:
    tokens = {"llama-65b": LONG_TOKENS, "llama-30b": SHORT_TOKENS}
    return {
        kind: (prompt_share * total, (1 - prompt_share) * total) for kind, total in tokens.items()
    }


def _fair_workload(prompt_share: float, seed: int) -> SyntheticWorkload:
    loads = [
        Traffic(kind, FAIR_RATES[kind], Uniform(*lengths))
        for kind, lengths in _fair_lengths(prompt_share).items()
    ]
    return SyntheticWorkload(loads, seconds=FAIR_REQUESTS / max(FAIR_RATES.values()), seed=seed)


def _fair_unit(prompt_share: float, costs: ProfileTable) -> PlannedUnit:
    lengths = _fair_lengths(prompt_share)
    weights = sum(costs.weight_bytes(kind, tp=FAIR_DEVICES) for kind in lengths)
    models = [
        PlannedModel(
            name=kind,
            kind=kind,
            rate=FAIR_RATES[kind],
            prompt_tokens=prompt,
            output_tokens=output,
            tp=FAIR_DEVICES,
            decode_share=0.5,
            max_batch=MAX_SEQS,
        )
        for kind, (prompt, output) in lengths.items()
    ]
    pool = DEVICE.memory - weights - PROCESSES * len(models)
    return unit("fairness", FAIR_DEVICES, weights, pool, models)


def main() -> None:
    """Runs all cases and prints the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dir", type=Path, help="recorded.json and CASE.yaml files")
    parser.add_argument(
        "--profile", type=Path, help="step times; by default muxserve_a100_profile.json beside DIR"
    )
    parser.add_argument("--json", action="store_true", help="only JSON on standard output")
    arguments = parser.parse_args()
    profile = arguments.profile or arguments.dir.resolve().parent / "muxserve_a100_profile.json"
    costs = ProfileTable(profile)
    cases = read_cases(arguments.dir)
    executions: tuple[Execution, ...] = ("time_sliced", "concurrent")
    total = len(cases) * len(SYSTEMS) * SEEDS
    total += len(executions) * len(PROMPT_SHARES) * SEEDS * (1 + len(PAPER_RATIOS))
    with Bars({"simulating": total}, show=True) as bars:
        report = {
            "cases": {case.name: compare(case, costs, bars) for case in cases},
            "fairness": {execution: fairness(costs, execution, bars) for execution in executions},
        }
    if not arguments.json:
        show(report)
    print(json.dumps(report, indent=2))


def show(report: Mapping[str, Any]) -> None:
    """Prints the ratios as a table on standard error."""
    table = Table("case", "ratio", "recorded", "simulated", "error")
    rows = [(name, case["ratios"]) for name, case in report["cases"].items()]
    for execution, result in report["fairness"].items():
        ratios = {
            f"adbs/{other}": {**ratio, "recorded": ratio["paper"]}
            for other, ratio in result["ratios"].items()
        }
        rows.append((f"fairness, {execution}", ratios))
    for name, ratios in rows:
        for label, ratio in ratios.items():
            figures = (f"{ratio[key]:.3f}" for key in ("recorded", "simulated"))
            table.add_row(name, label, *figures, f"{ratio['error']:+.1%}")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
