"""Chrome trace of the executed steps, for Perfetto or chrome://tracing.

Each unit is a process of the trace, each model has a track for prefills and one for decodes, and
counters show pages and requests after every step. Times are microseconds from the first step.

A timeline is a ring buffer of the latest steps, so that a server can record all the time. `dropped`
is the number of older steps.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from muxjax.errors import BenchError
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Prefill, Step, StepResult

DEFAULT_STEPS = 100_000
"""Number of steps that are kept: about half an hour at 50 steps a second, 50 MB of JSON."""
_COUNTERS = ("pages", "waiting", "running")


class _Entry(NamedTuple):
    unit: str
    model: str
    phase: str
    started: float
    seconds: float
    batch: int
    tokens: int
    emitted: int
    models: tuple[str, ...]  # of the unit at that time
    counts: tuple[tuple[int, ...], ...]  # for each of `_COUNTERS` one value a model


class Timeline:
    """Records steps and writes the trace file.

    Args:
      max_steps: number of steps that are kept.

    Raises:
      ValueError: `max_steps` is below 1.

    Attributes:
      dropped: number of steps that are no longer kept.
    """

    def __init__(self, max_steps: int = DEFAULT_STEPS) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, not {max_steps}")
        self._entries: deque[_Entry] = deque(maxlen=max_steps)
        self._models: dict[str, list[str]] = {}  # all models that each unit ever had
        self._present: tuple[str, ...] = ()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._entries)

    def record(
        self, scheduler: Scheduler, step: Step, result: StepResult, name: str = "unit"
    ) -> None:
        """Records a step that has been applied.

        Args:
          scheduler: scheduler of the unit that ran it.
          step: the step.
          result: its result.
          name: name of the unit.
        """
        present = tuple(scheduler.models)
        if present == self._present:
            present = self._present  # one object for all entries
        else:
            self._present = present
        known = self._models.setdefault(name, list(present))
        known += [model for model in present if model not in known]
        is_prefill = isinstance(step, Prefill)
        batch = step.chunks if isinstance(step, Prefill) else step.sequences
        emitted = sum([len(tokens) for tokens in result.tokens])
        states = scheduler.models.items()
        used = scheduler.allocator.used_pages
        counts = (
            tuple([used(model) for model, _ in states]),
            tuple([len(state.waiting) for _, state in states]),
            tuple([len(state.prefilling) + len(state.running) for _, state in states]),
        )
        if len(self._entries) == self._entries.maxlen:
            self.dropped += 1
        self._entries.append(
            _Entry(
                name,
                step.model,
                "prefill" if is_prefill else "decode",
                result.started,
                result.seconds,
                len(batch),
                step.num_tokens,
                emitted,
                present,
                counts,
            )
        )

    def observer(self, name: str) -> Callable[[Scheduler, Step, StepResult], None]:
        """Callback that records the steps of the unit `name`, for an engine or a simulation."""

        def observe(scheduler: Scheduler, step: Step, result: StepResult) -> None:
            self.record(scheduler, step, result, name)

        return observe

    def events(self) -> Iterator[dict[str, Any]]:
        """Trace events in the Chrome trace format."""
        pids = {name: index for index, name in enumerate(self._models, start=1)}
        tracks: dict[tuple[str, str, str], int] = {}
        for name, models in self._models.items():
            yield _metadata("process_name", pids[name], 0, name)
            for phase in ("prefill", "decode"):
                for model in models:
                    tid = tracks[name, model, phase] = len(tracks) + 1
                    yield _metadata("thread_name", pids[name], tid, f"{model} {phase}")
                    yield {
                        "ph": "M",
                        "name": "thread_sort_index",
                        "pid": pids[name],
                        "tid": tid,
                        "args": {"sort_index": 2 * models.index(model) + (phase == "decode")},
                    }
        zero = min((entry.started for entry in self._entries), default=0.0)
        last: dict[tuple[str, str], tuple[int, ...]] = {}
        for entry in self._entries:
            pid, start = pids[entry.unit], 1e6 * (entry.started - zero)
            yield {
                "ph": "X",
                "name": f"{entry.model} {entry.phase}",
                "cat": entry.phase,
                "pid": pid,
                "tid": tracks[entry.unit, entry.model, entry.phase],
                "ts": start,
                "dur": 1e6 * entry.seconds,
                "args": {"batch": entry.batch, "tokens": entry.tokens, "made": entry.emitted},
            }
            for counter, values in zip(_COUNTERS, entry.counts, strict=True):
                if last.get((entry.unit, counter)) == values:
                    continue
                last[entry.unit, counter] = values
                yield {
                    "ph": "C",
                    "name": counter,
                    "pid": pid,
                    "tid": 0,
                    "ts": start + 1e6 * entry.seconds,
                    "args": dict(zip(entry.models, values, strict=True)),
                }

    def write(self, path: Path) -> None:
        """Writes the trace as JSON, atomically."""
        part = path.with_name(f"{path.name}.part")
        with part.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "otherData": ')
            json.dump({"dropped_steps": self.dropped}, file)
            file.write(', "traceEvents": [\n')
            for index, event in enumerate(self.events()):
                file.write(",\n" if index else "")
                json.dump(event, file)
            file.write("\n]}\n")
        os.replace(part, path)


def _metadata(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


@contextmanager
def recorded_timeline(path: Path | None) -> Iterator[Timeline | None]:
    """Yields a timeline and writes it at the end, even after an error; yields None without a path.

    Raises:
      BenchError: the file cannot be written; its folder is checked before the run.
    """
    if path is None:
        yield None
        return
    if path.is_dir() or not path.parent.is_dir():
        raise BenchError(f"--trace {path}: must be a file in a folder that exists")
    timeline = Timeline()
    try:
        yield timeline
    finally:
        try:
            timeline.write(path)
        except OSError as error:
            raise BenchError(f"{path}: cannot be written: {error.strerror or error}") from error
        dropped = f"; {timeline.dropped} earlier steps were dropped" if timeline.dropped else ""
        sys.stderr.write(f"muxjax: trace of {len(timeline)} steps in {path}{dropped}\n")
