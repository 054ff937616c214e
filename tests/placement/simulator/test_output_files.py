from __future__ import annotations

import csv
import json
from pathlib import Path

from muxjax.placement.simulator.output_files import (
    record_file,
    write_json,
    write_plots,
    write_tables,
)
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_units import SystemConfig
from muxjax.placement.simulator.simulation import run_simulation
from tests.placement.simulator.harness import SETUP, workload


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_records_are_appended_in_order(tmp_path: Path) -> None:
    with record_file(tmp_path, "adbs", 1.5) as write:
        write(RequestRecord(0, "a", "u", "finished", 0.0, 5, 6, 6, 0.1, 0.25), True)
        write(RequestRecord(1, "a", "", "rejected", 0.5, 5, 6, reason="full"), False)
    records = rows(tmp_path / "requests-adbs-x1.5.csv")
    assert [row["status"] for row in records] == ["finished", "rejected"]
    assert [row["met_target"] for row in records] == ["1", "0"]
    assert (records[0]["first_token"], records[1]["end"], records[1]["reason"]) == (
        "0.1",
        "",
        "full",
    )


def test_tables_json_and_plots_are_written(tmp_path: Path) -> None:
    runs = [
        {"rate_scale": scale, **run_simulation(SETUP, SystemConfig(), workload())}
        for scale in (1.0, 2.0)
    ]
    policies = [{"policy": "adbs", "execution": "time_sliced", "runs": runs}]
    write_tables(policies, tmp_path)
    write_json({"policies": policies}, tmp_path / "simulation.json")
    write_plots(policies, tmp_path)
    summary = rows(tmp_path / "summary.csv")
    assert [row["rate_scale"] for row in summary] == ["1.0", "2.0"]
    assert float(summary[0]["total_throughput"]) == runs[0]["total_throughput"]
    assert float(summary[0]["ttft_s_p99"]) == runs[0]["ttft_s"]["p99"]
    models = rows(tmp_path / "models.csv")
    assert [row["model"] for row in models] == ["a", "b", "a", "b"]
    assert {"seed", "config_hash", "version", "throughput"} <= models[0].keys()
    assert json.loads((tmp_path / "simulation.json").read_text()) == {"policies": policies}
    assert (tmp_path / "simulation.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "simulation.svg").read_text()
