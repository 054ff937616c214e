"""`muxjax simulate`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.muxjax.cli.harness import run_cli
from tests.placement.simple_costs import plan, planned, unit

FLEET = """\
models:
  - name: small
    source: config:llama
    config: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
             vocab_size: 100, max_position_embeddings: 512}
    rate: 2
    prompt_tokens: 20
    output_tokens: 10
    slo: {ttft: 1, tpot: 0.5}
cluster: 1x2:a100-80gb
"""


class SimulateCli:
    """Runs `muxjax simulate` in a folder with a plan for two models."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.plan = self.write("plan.json", "")
        plan(unit(planned("a"), planned("b"))).save(self.plan)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        return run_cli(self._monkeypatch, self._capsys, "simulate", *arguments)

    def json(self, *arguments: object) -> dict[str, Any]:
        status, out, err = self(*arguments, "--json")
        assert status == 0, err
        report: dict[str, Any] = json.loads(out)
        return report

    def fail(self, *arguments: object) -> str:
        status, _, err = self(*arguments)
        assert status == 2
        return err


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> SimulateCli:
    return SimulateCli(tmp_path, monkeypatch, capsys)


QUICK = ("--requests", 20, "--rate-scales", "1,2")


def test_several_policies_are_simulated(run: SimulateCli) -> None:
    out = run.folder / "out" / "here"
    policies = "slo,adbs,fcfs,round_robin,static,temporal,spatial,mutex"
    report = run.json(run.plan, "--policy", policies, *QUICK, "--output", out)
    assert [policy["policy"] for policy in report["policies"]] == policies.split(",")
    for policy in report["policies"]:
        assert [result["rate_scale"] for result in policy["runs"]] == [1.0, 2.0]
        assert all(result["finished"] == 20 for result in policy["runs"])
        assert "max_rate_at_99" in policy
    assert {"seed", "config_hash", "version"} <= report.keys()
    assert report["targets"]["a"]["scale"] == 8.0
    assert json.loads((out / "simulation.json").read_text()) == report
    names = {path.name for path in out.iterdir()}
    assert {"summary.csv", "models.csv", "simulation.png", "simulation.svg"} <= names
    with (out / "requests-spatial-x2.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 20


def test_results_depend_only_on_the_seed(run: SimulateCli) -> None:
    first = run.json(run.plan, *QUICK, "--seed", 3)
    assert first == run.json(run.plan, *QUICK, "--seed", 3)
    other = run.json(run.plan, *QUICK, "--seed", 4)
    assert first["policies"][0]["runs"] != other["policies"][0]["runs"]
    assert first["config_hash"] != other["config_hash"]


def test_there_is_a_table_of_the_models_for_each_run(run: SimulateCli) -> None:
    status, out, _ = run(run.plan, *QUICK)
    assert status == 0
    assert out.count("adbs, rates x") == 2
    assert out.count("\nall ") == out.count("\na ") == 2
    assert "adbs: highest rate with 99 % in time" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_fleet_is_planned_first(run: SimulateCli) -> None:
    fleet = run.write("fleet.yaml", FLEET)
    report = run.json(fleet, *QUICK)
    assert report["policies"][0]["execution"] == "time_sliced"
    assert report["targets"]["small"] == {
        "ttft": 1.0,
        "tpot": 0.5,
        "scale": None,
        "kind": "small",
        "tp": 1,
    }
    report = run.json(fleet, *QUICK, "--slo-ttft", 2, "--execution", "concurrent")
    assert report["targets"]["small"]["ttft"] == 2.0
    assert report["targets"]["small"]["tpot"] is None
    assert report["policies"][0]["execution"] == "concurrent"


@pytest.mark.parametrize(
    "workload",
    [
        ("gamma", "--cv", 2),
        ("bursts", "--on-off", "1,2"),
        ("drift", "--change-points", "2,4"),
        ("poisson", "--alpha", 0.9, "--rate", 4),
    ],
)
def test_synthetic_workloads(run: SimulateCli, workload: tuple[object, ...]) -> None:
    report = run.json(run.plan, "--workload", *workload, "--seconds", 10, "--rate-scales", 1)
    assert report["policies"][0]["runs"][0]["finished"] > 0


def test_traces(run: SimulateCli) -> None:
    text = "Timestamp,Model,Request tokens,Response tokens\n5,GPT-4,20,5\n6,a,20,0\n7,a,20,3\n"
    trace = run.write("trace.csv", text)
    status, out, err = run(run.plan, "--workload", trace, "--map", "GPT-4=b", "--json")
    assert status == 0
    assert "1 failed requests" in err
    report = json.loads(out)
    assert report["workload"]["left_out"] == 1
    models = report["policies"][0]["runs"][0]["models"]
    assert (models["a"]["finished"], models["b"]["finished"]) == (1, 1)
    assert "has requests for GPT-4" in run.fail(run.plan, "--workload", trace)


def test_lengths_from_sharegpt(run: SimulateCli) -> None:
    turns = [{"from": "human", "value": "x" * 80}, {"from": "gpt", "value": "y" * 40}]
    path = run.write("sharegpt.json", json.dumps([{"conversations": turns}]))
    report = run.json(run.plan, "--lengths", path, *QUICK)
    run_ = report["policies"][0]["runs"][0]
    assert run_["output_tokens_per_s"] * run_["seconds"] == pytest.approx(20 * 10)
    assert "which is missing" in run.fail(run.plan, "--tokenizer", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a fleet file or --muxserve"),
        (("{plan}", "--policy", "best"), "no policy 'best'; there are slo, adbs"),
        (("{plan}", "--policy", "adbs,adbs"), "each once"),
        (("{plan}", "--execution", "threads"), "no execution 'threads'"),
        (("{plan}", "--cluster", "1x1:h100"), "--cluster is for planning a fleet"),
        (("{plan}", "--rate-scales", "1,x"), "takes comma-separated numbers"),
        (("{plan}", "--rate-scales", "0"), "rate scale must be above 0"),
        (("{plan}", "--rate", "-1"), "rate must be 0 or more"),
        (("{plan}", "--alpha", "-1"), "alpha must be 0 or more"),
        (("{plan}", "--seconds", "nan"), "--seconds must be above 0"),
        (("{plan}", "--seconds", "0.000001"), "the workload has no requests"),
        (("{plan}", "--requests", "0"), "--requests must be at least 1"),
        (("{plan}", "--max-waiting", "0"), "--max-waiting must be at least 1"),
        (("{plan}", "--cv", "2"), "--cv is for --workload gamma, not poisson"),
        (("{plan}", "--workload", "gamma", "--cv", "-2"), "cv must be 0 or more"),
        (("{plan}", "--workload", "bursts", "--on-off", "1"), "--on-off takes two numbers"),
        (("{plan}", "--workload", "tides"), "no workload 'tides': neither one of poisson"),
        (("{plan}", "--workload", "{trace}", "--cv", "2"), "--cv is for synthetic workloads"),
        (("{plan}", "--workload", "{trace}"), "trace.jsonl:2: out of order"),
        (("{plan}", "--map", "a=b"), "--map is for traces"),
        (("{plan}", "--slo-tpot", "0"), "target for tpot must be above 0"),
        (("missing.json",), "missing.json: No such file"),
    ],
)
def test_errors_are_one_line(run: SimulateCli, arguments: tuple[str, ...], message: str) -> None:
    lines = [{"timestamp": time, "input_length": 3, "output_length": 3} for time in (1000, 500)]
    trace = run.write("trace.jsonl", "\n".join(json.dumps(line) for line in lines))
    filled = [part.format(plan=run.plan, trace=trace) for part in arguments]
    err = run.fail(*filled)
    assert message in err
    assert err.count("\n") == 1
