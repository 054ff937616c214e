"""`muxjax bench serve`, on a fleet of tiny models."""

from __future__ import annotations

import csv
import json

import pytest

from tests.muxjax.cli.bench_cli import BenchCli


def test_policies_take_turns_on_one_workload(run: BenchCli) -> None:
    folder, trace = run.folder / "out", run.folder / "trace.json"
    workload = ["--rate", 40, "--requests", 8, "--alpha", 1.5]
    options = ["--policy", "adbs,fcfs", "--rounds", 2, "--slo-scale", 1000]
    files = ["-o", folder, "--trace", trace]
    out = run.succeed("bench", "serve", run.fleet, *workload, *options, *files, "--json")
    report = json.loads(out)
    assert [(result["policy"], result["round"]) for result in report["runs"]] == [
        ("adbs", 1),
        ("fcfs", 1),
        ("adbs", 2),
        ("fcfs", 2),
    ]
    assert all(result["finished"] == 8 for result in report["runs"])
    assert all(result["slo_attainment"] == 1 for result in report["runs"])
    assert report["medians"]["fcfs"]["rounds"] == 2
    assert report["medians"]["fcfs"]["slo_attainment"]["median"] == 1
    assert {row["model"] for row in report["isolated"]} == {"llama", "qwen3"}
    assert json.loads((folder / "serve.json").read_text()) == report
    with (folder / "requests-fcfs-r2.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 8
    events = json.loads(trace.read_text())["traceEvents"]
    units = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert "fcfs, round 2" in units


def test_the_policy_and_targets_have_defaults(run: BenchCli) -> None:
    out = run.succeed("bench", "serve", run.fleet, "--rate", 40, "--requests", 2, "--json")
    report = json.loads(out)
    assert report["policies"] == ["adbs"]
    assert report["rounds"] == 1
    assert report["targets"]["llama"]["scale"] == 8.0
    assert report["workload"]["offered"] == 2


def test_a_given_target_replaces_the_default_scale(run: BenchCli) -> None:
    workload = ["--rate", 40, "--requests", 2]
    options = ["--slo-ttft", 100, "--json"]
    report = json.loads(run.succeed("bench", "serve", run.fleet, *workload, *options))
    assert report["targets"]["llama"]["ttft"] == 100.0
    assert report["targets"]["llama"]["scale"] is None
    assert report["runs"][0]["slo_attainment"] == 1


def test_a_trace_is_replayed(run: BenchCli) -> None:
    trace = run.folder / "trace.jsonl"
    rows = [
        {"timestamp": 0, "model": "x", "input_length": 3, "output_length": 4},
        {"timestamp": 20, "model": "qwen3", "input_length": 5, "output_length": 2},
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run.succeed("bench", "serve", run.fleet, "--workload", trace, "--map", "x=llama")
    assert "2 requests" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "best"], "no 'best'; there are"),
        (["--policy", "adbs,adbs"], "each once"),
        (["--rounds", "0"], "--rounds"),
        (["--slo-scale", "0"], "--slo-scale"),
        (["--slo-ttft", "0"], "--slo-ttft"),
        (["--slo-tpot", "nan"], "--slo-tpot"),
        (["--requests", "0"], "--requests"),
        (["--duration", "0"], "--duration"),
        (["--cv", "2"], "--cv is for --workload gamma"),
        (["--on-off", "1"], "two numbers"),
        (["--change-points", "a"], "takes comma-separated numbers"),
        (["--workload", "nonsense"], "no workload 'nonsense'"),
        (["--map", "a=b"], "--map is for traces"),
        (["--map", "a"], "TRACE=MODEL"),
        (["--prompt-tokens", "0.5"], "at least 1 token"),
        (["--prompt-tokens", "250", "--output-tokens", "2"], "llama, whose limit is 256 tokens"),
        (["--trace", "/nowhere/trace.json"], "a folder that exists"),
    ],
)
def test_invalid_options_are_rejected(run: BenchCli, arguments: list[str], message: str) -> None:
    assert message in run.fail("bench", "serve", run.fleet, *arguments)
