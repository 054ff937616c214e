"""Output files of a simulation: JSON, tables, records, plots.

| file | contents |
|---|---|
| `simulation.json` | the full report: each policy's runs with their metrics, `max_rate_at_99` |
| `summary.csv` | one row per run |
| `models.csv` | one row per run and model |
| `requests-POLICY-xSCALE.csv` | one row per request, in order of completion |
| `simulation.png`, `.svg` | throughput and attainment by rate, one line per policy |
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulation import OnRecord

_LATENCIES = ("ttft_s", "tpot_s", "latency_s")
_RUN = ("policy", "execution", "rate_scale", "seed", "config_hash", "version")
_RECORD = tuple(field.name for field in fields(RequestRecord))


@contextmanager
def record_file(folder: Path, policy: str, scale: float) -> Iterator[OnRecord]:
    """Opens a CSV file of requests and yields a function that appends a record to it."""
    with (folder / f"requests-{policy}-x{scale:.6g}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*_RECORD, "met_target"))

        def write(record: RequestRecord, met: bool) -> None:
            writer.writerow((*(getattr(record, name) for name in _RECORD), int(met)))

        yield write


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Writes the full report."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def write_tables(policies: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes `summary.csv` and `models.csv`."""
    runs = [run for policy in policies for run in policy["runs"]]
    _write_rows([_flatten_run(run) for run in runs], folder / "summary.csv")
    rows = []
    for run in runs:
        head = {key: run[key] for key in _RUN}
        for name, model in run["models"].items():
            rows.append({**head, "model": name, **_flatten_run(model)})
    _write_rows(rows, folder / "models.csv")


def write_plots(policies: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Plots throughput and attainment by offered rate, as in MuxServe's figures.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    highest = 0.0
    for policy in policies:
        runs = [run for run in policy["runs"] if run["offered_rate"] is not None]
        rates = [run["offered_rate"] for run in runs]
        highest = max([highest, *rates])
        label = f"{policy['policy']} ({policy['execution'].replace('_', ' ')})"
        left.plot(rates, [run["total_throughput"] for run in runs], marker="o", label=label)
        attained = [100 * run["slo_attainment"] for run in runs]
        right.plot(rates, attained, marker="o", label=label)
    left.plot([0, highest], [0, highest], color="grey", linestyle=":", label="offered")
    left.set(ylabel="throughput (requests/s)")
    right.axhline(99, color="grey", linestyle=":", label="99 %")
    right.set(ylabel="requests within their SLO (%)", ylim=(0, 102))
    for axes in (left, right):
        axes.set(xlabel="offered rate (requests/s)", xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"simulation.{suffix}", dpi=150)


def _flatten_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a run to a row: one column per latency quantile, without models and units."""
    row = {key: value for key, value in run.items() if not isinstance(value, dict | list)}
    for latency in _LATENCIES:
        for name, value in run[latency].items():
            row[f"{latency}_{name}"] = value
    return row


def _write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
