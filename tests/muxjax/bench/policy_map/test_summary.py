from __future__ import annotations

import pytest

from muxjax.bench.policy_map.summary import concurrency_gains, judge, report, summary
from tests.muxjax.bench.policy_map.harness import a_cell


def test_a_cell_passes_within_a_point_of_the_best_baseline() -> None:
    judgment = judge(a_cell(slo=0.90, adbs=0.80, fcfs=0.905))
    assert judgment["best_baseline"] == "fcfs"
    assert judgment["ahead"] == pytest.approx(-0.005)
    assert judgment["passes"]
    assert not judge(a_cell(slo=0.89, adbs=0.80, fcfs=0.905))["passes"]


def test_a_cell_misses_with_less_throughput_than_adbs() -> None:
    assert judge(a_cell(served=0.991, slo=0.9, adbs=0.8))["passes"]
    assert not judge(a_cell(served=0.98, slo=0.9, adbs=0.8))["passes"]


def test_a_summary_lists_misses_and_compares_common_policies() -> None:
    (entry,) = summary([a_cell(slo=0.9, adbs=0.8, fcfs=0.7), a_cell(slo=0.5, adbs=0.7)])
    assert entry["cells"] == 2
    assert entry["mean_attainment"] == pytest.approx({"slo": 0.7, "adbs": 0.75})
    assert not entry["higher_in_the_mean"]
    assert entry["worst"] == pytest.approx(-0.2)
    assert [miss["best_baseline"] for miss in entry["missed"]] == ["adbs"]


def test_gains_are_of_cells_in_both_maps() -> None:
    cells = [a_cell(slo=0.9, adbs=0.8), a_cell("concurrent", slo=0.95, adbs=0.8)]
    (gain,) = concurrency_gains(cells)
    assert gain["concurrent_minus_time_sliced"] == pytest.approx(0.05)
    assert concurrency_gains(cells[:1]) == []
    assert concurrency_gains([cells[0], cells[1] | {"seconds": 5.0}]) == []  # different requests


def test_a_cell_without_slo_is_kept_and_not_evaluated() -> None:
    content = report([a_cell(adbs=0.8), a_cell("concurrent", slo=0.9, adbs=0.8)])
    assert [cell.get("passes") for cell in content["cells"]] == [True, None]
    assert len(content["maps"]) == 1


def test_cells_with_placements_chosen_ahead_are_a_separate_map() -> None:
    cells = [{**a_cell(slo=0.9, adbs=0.8), "chosen_ahead": ahead} for ahead in (False, True)]
    assert [entry["chosen_ahead"] for entry in summary(cells)] == [False, True]
    assert [cell["chosen_ahead"] for cell in report(cells)["cells"]] == [False, True]
    (default,) = summary([a_cell(slo=0.9, adbs=0.8)])  # without the key
    assert default["chosen_ahead"] is False
