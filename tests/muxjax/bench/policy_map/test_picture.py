from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from muxjax.bench.policy_map.picture import draw_map
from tests.muxjax.bench.policy_map.harness import a_cell

SVG = "{http://www.w3.org/2000/svg}"


def drawn(tmp_path: Path, *cells: dict[str, object]) -> tuple[list[ElementTree.Element], list[str]]:
    path = tmp_path / "map.svg"
    draw_map(cells, path)
    tree = ElementTree.parse(path)
    texts = [text.text or "" for text in tree.iter(f"{SVG}text")]
    return list(tree.iter(f"{SVG}rect"))[1:], texts


def test_a_cell_shows_attainment_and_lead(tmp_path: Path) -> None:
    (square,), texts = drawn(tmp_path, a_cell(slo=0.873, adbs=0.8, fcfs=0.85))
    assert {"87", "+2.3", "SLO scale 2", "a100, time sliced"} <= set(texts)
    assert square.get("stroke") is None


def test_a_cell_that_misses_the_criteria_has_a_border(tmp_path: Path) -> None:
    (square,), texts = drawn(tmp_path, a_cell(slo=0.8, adbs=0.85))
    assert square.get("stroke") is not None
    assert "-5.0" in texts
    (square,), _ = drawn(tmp_path, a_cell(served=0.98, slo=0.9, adbs=0.8))
    assert square.get("stroke") is not None


def test_two_execution_models_are_compared(tmp_path: Path) -> None:
    cells = a_cell(slo=0.8, adbs=0.8), a_cell("concurrent", slo=0.85, adbs=0.8)
    squares, texts = drawn(tmp_path, *cells)
    assert len(squares) == 3
    assert "a100: concurrent minus time sliced, points" in texts
    assert texts.count("+5.0") == 2
