from __future__ import annotations

import pytest

from muxjax.bench.policy_map.summary import concurrency_gains, judge, report, summary
from tests.muxjax.bench.policy_map.harness import a_cell


def test_a_cell_passes_within_a_point_of_the_best_baseline() -> None:
    found = judge(a_cell(slo=0.90, adbs=0.80, fcfs=0.905))
    assert found["best_baseline"] == "fcfs"
    assert found["ahead"] == pytest.approx(-0.005)
    assert found["passes"]
    assert not judge(a_cell(slo=0.89, adbs=0.80, fcfs=0.905))["passes"]


def test_a_cell_misses_that_serves_less_than_adbs() -> None:
    assert judge(a_cell(served=0.991, slo=0.9, adbs=0.8))["passes"]
    assert not judge(a_cell(served=0.98, slo=0.9, adbs=0.8))["passes"]


def test_a_map_lists_what_misses_and_compares_the_policies_that_all_cells_have() -> None:
    (found,) = summary([a_cell(slo=0.9, adbs=0.8, fcfs=0.7), a_cell(slo=0.5, adbs=0.7)])
    assert found["cells"] == 2
    assert found["mean_attainment"] == pytest.approx({"slo": 0.7, "adbs": 0.75})
    assert not found["higher_in_the_mean"]
    assert found["worst"] == pytest.approx(-0.2)
    assert [miss["best_baseline"] for miss in found["missed"]] == ["adbs"]


def test_sharing_is_of_cells_that_both_maps_have() -> None:
    cells = [a_cell(slo=0.9, adbs=0.8), a_cell("concurrent", slo=0.95, adbs=0.8)]
    (found,) = concurrency_gains(cells)
    assert found["concurrent_minus_time_sliced"] == pytest.approx(0.05)
    assert concurrency_gains(cells[:1]) == []
    assert concurrency_gains([cells[0], cells[1] | {"seconds": 5.0}]) == []  # of other requests


def test_a_cell_without_slo_is_kept_and_not_judged() -> None:
    found = report([a_cell(adbs=0.8), a_cell("concurrent", slo=0.9, adbs=0.8)])
    assert [cell.get("passes") for cell in found["cells"]] == [True, None]
    assert len(found["maps"]) == 1


def test_placements_chosen_ahead_make_a_map_of_their_own() -> None:
    cells = [{**a_cell(slo=0.9, adbs=0.8), "chosen_ahead": ahead} for ahead in (False, True)]
    assert [one["chosen_ahead"] for one in summary(cells)] == [False, True]
    assert [cell["chosen_ahead"] for cell in report(cells)["cells"]] == [False, True]
    (before,) = summary([a_cell(slo=0.9, adbs=0.8)])  # a cell of a file that does not say
    assert before["chosen_ahead"] is False
