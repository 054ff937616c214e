"""Small maps with roofline times of H200s, since MuxServe's profile is not in the repository."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from muxjax.bench.policy_map import run as map_run
from muxjax.cli import main as cli

TINY = (
    "muxjax bench policy-map --hardware h200 --alpha 1.1 --load 0.2 --slo-scale 2,8 --seconds 0.3"
)


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [*TINY.split(), *options])
    monkeypatch.setattr(map_run, "WorkerPool", ThreadPoolExecutor)
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise


@pytest.mark.usefixtures("three_models")
def test_a_map_end_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "map.json"
    options = ("--policies", "slo,adbs", "--json", "--output", str(output))
    run(monkeypatch, *options, "--plot", str(tmp_path / "map.svg"))
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    keys = [
        (cell["execution"], cell["alpha"], cell["load"], cell["slo_scale"])
        for cell in printed["cells"]
    ]
    models = ("concurrent", "time_sliced")
    assert keys == [(model, 1.1, 0.2, scale) for model in models for scale in (2.0, 8.0)]
    for cell in printed["cells"]:
        assert set(cell["slo_attainment"]) == set(cell["throughput"]) == {"slo", "adbs"}
        assert all(0 <= share <= 1 for share in cell["slo_attainment"].values())
        assert all(served["total"] > 0 for served in cell["throughput"].values())
    assert [entry["cells"] for entry in printed["maps"]] == [2, 2]
    assert len(printed["concurrent_minus_time_sliced"]) == 2
    assert (tmp_path / "map.svg").stat().st_size > 1000
    saved = json.loads(output.read_text())
    assert saved["cells"] == printed["cells"]

    # Known results are kept, and missing policies are added.
    saved["cells"][0]["slo_attainment"]["slo"] = 0.123
    output.write_text(json.dumps(saved))
    extended = ("--policies", "slo,adbs,static", "--execution", "concurrent")
    run(monkeypatch, *extended, "--output", str(output))
    updated = json.loads(output.read_text())["cells"]
    assert updated[0]["slo_attainment"]["slo"] == 0.123
    assert [set(cell["slo_attainment"]) for cell in updated] == [
        {"slo", "adbs", "static"},
        {"slo", "adbs", "static"},
        {"slo", "adbs"},
        {"slo", "adbs"},
    ]


@pytest.mark.parametrize(
    "options", [("--policies", "slo,fcfs"), ("--alpha", "-1"), ("--hardware", "abacus")]
)
def test_invalid_options_are_rejected(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *options)
    assert stopped.value.code == 2
