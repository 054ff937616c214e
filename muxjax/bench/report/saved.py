"""Result files: written by `bench` and `simulate`, read by `bench report`.

| file | contents |
|---|---|
| `serve.json` | a run of `bench serve` |
| `requests-POLICY-rROUND.csv` | a row for each of its requests, written when it ends |
| any `.json` with `"kind": "http"`, or with vLLM's keys | runs over HTTP, one per line |
| any `.json` with `"kind": "steps"` | a run of `bench steps --json` |
| `simulation.json` | a run of `muxjax simulate --output` |
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from muxjax.bench.compare import OnRecord
from muxjax.errors import BenchError
from muxjax.placement.simulator.records import RequestRecord

_RECORD = tuple(field.name for field in fields(RequestRecord))


def save(report: Mapping[str, Any], path: Path) -> None:
    """Writes a report; replaces an existing one.

    Raises:
      BenchError: the file cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def record_file(path: Path) -> Iterator[OnRecord]:
    """Opens a CSV file; yields a function that writes one record."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((*_RECORD, "met_target"))

        def write(record: RequestRecord, met: bool) -> None:
            writer.writerow((*(getattr(record, name) for name in _RECORD), int(met)))

        yield write


@dataclass(frozen=True)
class SavedReport:
    """A report and its file.

    Attributes:
      path: the file.
      kind: serve, http, steps, or simulation.
      report: the contents.
    """

    path: Path
    kind: str
    report: dict[str, Any]


def find_reports(folder: Path) -> list[SavedReport]:
    """Finds all reports in a folder and its subfolders, sorted by name.

    Raises:
      BenchError: the folder does not exist or has no report.
    """
    if not folder.is_dir():
        raise BenchError(f"{folder}: no such folder")
    reports = []
    for path in sorted(folder.rglob("*.json")):
        reports += [SavedReport(path, kind, report) for kind, report in _reports(path)]
    if not reports:
        raise BenchError(
            f"{folder}: contains no results; `bench serve --output`, `bench http "
            f"--save-result`, `bench steps --json` and `simulate --output` write them"
        )
    return reports


def _reports(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: cannot be read: {error}") from error
    try:
        reports = [json.loads(text)]
    except ValueError:
        try:  # appended results, one per line
            reports = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            return
    for report in reports:
        kind = _kind(report)
        if kind is not None:
            yield kind, report


def _kind(report: object) -> str | None:
    """Returns the kind of a report, or None for other contents."""
    if not isinstance(report, dict):
        return None
    if report.get("kind") in ("serve", "http", "steps"):
        return str(report["kind"])
    if {"policies", "config_hash", "targets"} <= report.keys():
        return "simulation"
    if {"request_throughput", "output_throughput", "duration"} <= report.keys():
        return "http"  # a result of vLLM
    return None
