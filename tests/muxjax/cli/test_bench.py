"""`muxjax bench steps`, `serve`, `report` and `picture`, on a fleet of tiny models."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from muxjax.bench import session as session_module
from muxjax.bench.session import BenchSession
from muxjax.bench.steps import Timed
from muxjax.cli import main as cli
from muxjax.config.fleet_file import load_fleet_config
from tests.muxjax.conftest import TINY_FLEET

SERVE = ["--rate", "40", "--requests", "8"]


class Cli:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.fleet = folder / "fleet.yaml"
        self.fleet.write_text(yaml.safe_dump(TINY_FLEET))

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr("sys.argv", ["muxjax", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as ending:
            status = ending.code or 0
        else:
            status = 0
        out, err = self._capsys.readouterr()
        return int(status), out, err

    def ok(self, *arguments: object) -> str:
        status, out, err = self(*arguments)
        assert status == 0, err
        return out


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, session: BenchSession) -> Cli:
    """The command line; the fleet is loaded once for all tests."""

    @contextmanager
    def load(config: object) -> Iterator[BenchSession]:
        assert config == load_fleet_config(TINY_FLEET)
        yield session

    monkeypatch.setattr(session_module.BenchSession, "load", load)
    return Cli(tmp_path, monkeypatch, capsys)


def test_steps_give_a_profile_to_plan_and_simulate_with(run: Cli) -> None:
    profile = run.folder / "profile.json"
    out = run.ok("bench", "steps", run.fleet, "--repeats", 1, "--context", 40, "-o", profile)
    assert "in service: factor on the time" in out
    assert "written to" in out
    plan = run.folder / "plan.json"
    run.ok("plan", run.fleet, "--profile", profile, "-o", plan)
    trace = run.folder / "trace.json"
    found = json.loads(
        run.ok("simulate", plan, "--requests", 10, "--rate-scales", 1, "--trace", trace, "--json")
    )
    assert found["policies"][0]["runs"][0]["finished"] == 10
    steps = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(steps) > 10


def test_an_interrupt_keeps_the_rounds_that_are_finished(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from muxjax.bench import steps, steps_run

    def measure(session: BenchSession, *, into: steps.StepMeasurement, done: Any, **_: Any) -> None:
        into.steps = [
            Timed(kind.model, kind.phase, kind.size, kind.parts, kind.context, kind.last, (0.01,))
            for kind in steps.step_kinds(session, [40])
        ]
        raise KeyboardInterrupt

    monkeypatch.setattr(steps_run, "measure_in_service", measure)
    status, out, err = run("bench", "steps", run.fleet, "--context", 40, "--json")
    assert status == 0
    assert "interrupted after 1 of 5 rounds" in err
    assert set(json.loads(out)["profile"]) == {"llama", "qwen3", "_steps"}


def test_policies_are_replayed_in_turn_and_reported(run: Cli) -> None:
    folder, trace = run.folder / "out", run.folder / "trace.json"
    wanted = (
        f"--policy adbs,fcfs --rounds 2 --alpha 1.5 --slo-scale 1000 -o {folder} --trace {trace}"
    )
    out = run.ok("bench", "serve", run.fleet, *SERVE, *wanted.split(), "--json")
    found = json.loads(out)
    assert [(one["policy"], one["round"]) for one in found["runs"]] == [
        ("adbs", 1),
        ("fcfs", 1),
        ("adbs", 2),
        ("fcfs", 2),
    ]
    assert all(one["finished"] == 8 and one["slo_attainment"] == 1 for one in found["runs"])
    assert found["medians"]["fcfs"]["rounds"] == 2
    assert found["medians"]["fcfs"]["slo_attainment"]["median"] == 1
    assert {row["model"] for row in found["isolated"]} == {"llama", "qwen3"}
    assert json.loads((folder / "serve.json").read_text()) == found
    with (folder / "requests-fcfs-r2.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 8
    events = json.loads(trace.read_text())["traceEvents"]
    units = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert "fcfs, round 2" in units

    drawn = run.folder / "trace.svg"
    run.ok("bench", "picture", trace, "-o", drawn, "--title", "A < B")
    assert drawn.read_text().startswith("<svg")
    assert "A &lt; B" in drawn.read_text()
    out = run.ok("bench", "report", folder)
    assert "adbs" in out
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page  # it needs nothing else
    assert (folder / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_is_replayed(run: Cli) -> None:
    trace = run.folder / "trace.jsonl"
    rows = [
        {"timestamp": 0, "model": "x", "input_length": 3, "output_length": 4},
        {"timestamp": 20, "model": "qwen3", "input_length": 5, "output_length": 2},
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run.ok("bench", "serve", run.fleet, "--workload", trace, "--map", "x=llama")
    assert "2 requests" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "best"], "no 'best'; there are"),
        (["--policy", "adbs,adbs"], "each once"),
        (["--rounds", "0"], "--rounds"),
        (["--slo-scale", "0"], "--slo-scale"),
        (["--requests", "0"], "--requests"),
        (["--duration", "0"], "--duration"),
        (["--cv", "2"], "--cv is for --workload gamma"),
        (["--on-off", "1"], "two numbers"),
        (["--change-points", "a"], "takes numbers"),
        (["--workload", "nonsense"], "no workload 'nonsense'"),
        (["--map", "a=b"], "--map is for traces"),
        (["--map", "a"], "TRACE=MODEL"),
        (["--prompt-tokens", "0.5"], "at least 1 token"),
        (["--prompt-tokens", "250", "--output-tokens", "2"], "llama, whose limit is 256 tokens"),
        (["--trace", "/nowhere/trace.json"], "a folder that exists"),
    ],
)
def test_what_cannot_be_served(run: Cli, arguments: list[str], message: str) -> None:
    status, _, err = run("bench", "serve", run.fleet, *arguments)
    assert status == 2
    assert message in " ".join(err.split())


def test_what_cannot_be_reported(run: Cli) -> None:
    for folder, message in ((run.folder / "no", "no such folder"), (run.folder, "no results")):
        status, _, err = run("bench", "report", folder)
        assert status == 2
        assert message in err
    (run.folder / "broken.json").write_text('{"kind": "serve"}')
    status, _, err = run("bench", "report", run.folder)
    assert status == 2
    assert "not a result" in err
    status, _, err = run("bench", "picture", run.folder / "broken.json", "-o", run.folder / "x.svg")
    assert status == 2
    assert "not a Chrome trace" in err
    status, _, err = run("bench", "steps", run.fleet, "--repeats", 0)
    assert status == 2
    assert "--repeats" in err
