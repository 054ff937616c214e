"""Chrome trace of the executed steps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.timeline import Timeline
from muxjax.testing.mock_executor import MockExecutor
from tests.muxjax.scheduling.harness import request, spec

SPECS = [spec("a", 2, 4), spec("b", 3, 6)]


def run(timeline: Timeline, name: str = "unit") -> int:
    """Runs two requests; returns the number of steps."""
    scheduler, executor = Scheduler(SPECS, 60, create_policy("adbs")), MockExecutor(SPECS, 60)
    scheduler.add(request(1, "a", 6, max_tokens=5))
    scheduler.add(request(2, "b", 3, max_tokens=5))
    steps = 0
    while (step := scheduler.next_step(float(steps))) is not None:
        result = executor.result(executor.submit(step))
        scheduler.apply(step, result, float(steps))
        timeline.record(scheduler, step, result, name)
        steps += 1
    return steps


def write_and_read(timeline: Timeline, folder: Path) -> list[dict[str, Any]]:
    path = folder / "trace.json"
    timeline.write(path)
    assert [file.name for file in folder.iterdir()] == ["trace.json"]
    trace = json.loads(path.read_text())
    assert trace["otherData"]["dropped_steps"] == timeline.dropped
    return trace["traceEvents"]


def test_a_track_for_each_model_and_phase(tmp_path: Path) -> None:
    timeline = Timeline()
    steps = run(timeline)
    events = write_and_read(timeline, tmp_path)
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(names.values()) == ["a decode", "a prefill", "b decode", "b prefill"]
    boxes = [e for e in events if e["ph"] == "X"]
    assert len(boxes) == steps == len(timeline)
    assert all(e["name"] == names[e["tid"]] for e in boxes)
    first = next(e for e in boxes if e["name"] == "a prefill")
    assert first["args"] == {"batch": 1, "tokens": 6, "made": 1}
    assert min(e["ts"] for e in boxes) == 0
    assert all(e["dur"] > 0 for e in boxes)


def test_counters_follow_the_unit(tmp_path: Path) -> None:
    timeline = Timeline()
    run(timeline)
    events = [e for e in write_and_read(timeline, tmp_path) if e["ph"] == "C"]
    pages = [e["args"] for e in events if e["name"] == "pages"]
    assert max(row["a"] for row in pages) > 0
    assert pages[-1] == {"a": 0, "b": 0}
    waiting = [e["args"] for e in events if e["name"] == "waiting"]
    assert waiting[0]["b"] == 1 or waiting[0]["a"] == 1
    assert all(before != after for before, after in itertools.pairwise(pages))


def test_several_units_are_processes(tmp_path: Path) -> None:
    timeline = Timeline()
    run(timeline, "one")
    run(timeline, "two")
    events = write_and_read(timeline, tmp_path)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(names.values()) == ["one", "two"]
    tracks = [(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"]
    assert len(tracks) == len({tid for _, tid in tracks}) == 8


def test_ring_buffer_keeps_the_latest_steps(tmp_path: Path) -> None:
    timeline = Timeline(max_steps=3)
    steps = run(timeline)
    assert (len(timeline), timeline.dropped) == (3, steps - 3)
    assert sum(e["ph"] == "X" for e in write_and_read(timeline, tmp_path)) == 3
    with pytest.raises(ValueError, match="max_steps must be at least 1, not 0"):
        Timeline(0)


def test_empty_timeline_is_a_valid_trace(tmp_path: Path) -> None:
    assert write_and_read(Timeline(), tmp_path) == []
