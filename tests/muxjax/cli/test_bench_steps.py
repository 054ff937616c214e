"""`muxjax bench steps`, on a fleet of tiny models."""

from __future__ import annotations

import json
from typing import Any

import pytest

from muxjax.bench import steps, steps_run
from muxjax.bench.session import BenchSession
from muxjax.bench.steps import Timed
from tests.muxjax.cli.bench_cli import BenchCli


def test_steps_write_a_profile_for_plan_and_simulate(run: BenchCli) -> None:
    profile = run.folder / "profile.json"
    out = run.succeed("bench", "steps", run.fleet, "--repeats", 1, "--context", 40, "-o", profile)
    assert "in service: factor on the time" in out
    assert "written to" in out
    plan = run.folder / "plan.json"
    run.succeed("plan", run.fleet, "--profile", profile, "-o", plan)
    trace = run.folder / "trace.json"
    options = ["--requests", 10, "--rate-scales", 1, "--trace", trace, "--json"]
    report = json.loads(run.succeed("simulate", plan, *options))
    assert report["policies"][0]["runs"][0]["finished"] == 10
    events = json.loads(trace.read_text())["traceEvents"]
    assert len([event for event in events if event["ph"] == "X"]) > 10


def test_an_interrupt_keeps_finished_rounds(run: BenchCli, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_steps_reject_zero_repeats(run: BenchCli) -> None:
    assert "--repeats" in run.fail("bench", "steps", run.fleet, "--repeats", 0)
