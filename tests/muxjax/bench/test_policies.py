"""Files of earlier rounds, and summaries of rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muxjax.bench.policies import KEYS, PolicyGrid, read_rounds, summarize_rounds, table_rows
from muxjax.errors import BenchError


def grid(*, simulated: bool = False) -> PolicyGrid:
    return PolicyGrid(("slo", "adbs"), ("adbs",), simulated=simulated)


def test_real_and_simulated_rounds_are_not_mixed(tmp_path: Path) -> None:
    rounds = tmp_path / "rounds.jsonl"
    cell = {"policies": {"slo": {}, "adbs": {}}}
    rounds.write_text(json.dumps({"seed": 0, "cells": [cell]}) + "\n")
    assert len(read_rounds(rounds, grid())) == 1
    with pytest.raises(BenchError, match="round 1 is not simulated; name another file"):
        read_rounds(rounds, grid(simulated=True))
    assert read_rounds(tmp_path / "missing.jsonl", grid()) == []


def test_rounds_without_a_policy_are_rejected(tmp_path: Path) -> None:
    rounds = tmp_path / "rounds.jsonl"
    rounds.write_text(json.dumps({"cells": [{"policies": {"slo": {}}}]}) + "\n")
    with pytest.raises(BenchError, match="round 1 has no adbs"):
        read_rounds(rounds, grid())


def test_a_baseline_must_be_among_the_policies() -> None:
    with pytest.raises(BenchError, match="--against fcfs is not in --policies"):
        PolicyGrid(("slo", "adbs"), ("fcfs",))
    with pytest.raises(BenchError, match="no policy 'best'"):
        PolicyGrid(("best",), ())


def test_the_ratio_is_the_median_over_rounds() -> None:
    def a_round(slo: float, adbs: float) -> dict[str, object]:
        policies = {"slo": dict.fromkeys(KEYS, slo), "adbs": dict.fromkeys(KEYS, adbs)}
        return {"cells": [{"alpha": 0.7, "load": 1.0, "rate": 5.0, "policies": policies}]}

    rows, ratios = summarize_rounds([a_round(2, 1), a_round(3, 1), a_round(8, 2)], grid())
    assert ratios == {"alpha 0.7, load 1": 3.0}
    assert [row["policy"] for row in rows] == ["slo", "adbs"]
    assert (rows[0]["ratio_lowest"], rows[0]["ratio_highest"]) == (2.0, 4.0)
    assert table_rows(rows)[0]["weighted goodput/s"] == "3 (2-8)"
