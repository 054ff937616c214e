"""Draws the policy map as an SVG: a square for each cell, a panel for each SLO scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from muxjax.bench.policy_map.summary import judge

_CELL, _GAP, _LEFT, _TOP = 37, 26, 70, 46

Cell = Mapping[str, Any]
Square = Callable[[Any], tuple[str, Sequence[str]]]
"""Returns the SVG attributes of a square and its lines of text."""


def draw_map(cells: Sequence[Cell], path: Path) -> None:
    """Writes an SVG of the attainment of `slo` and its lead over the best baseline.

    If there are maps of both execution models, their difference is drawn as well.

    Args:
      cells: cells of one or more maps; each map is a row of panels.
      path: the file.
    """
    alphas = sorted({cell["alpha"] for cell in cells})
    loads = sorted({cell["load"] for cell in cells})
    scales = sorted({cell["slo_scale"] for cell in cells})
    rows: list[tuple[str, dict[tuple[float, ...], Any], Square]] = []
    maps: dict[tuple[str, str], dict[tuple[float, ...], Cell]] = {}
    for cell in cells:
        key = (cell["hardware"], cell["execution"])
        maps.setdefault(key, {})[cell["slo_scale"], cell["alpha"], cell["load"]] = cell
    for (hardware, execution), map_cells in sorted(maps.items()):
        rows.append(
            (f"{hardware}, {execution.replace('_', ' ')}", {**map_cells}, _attainment_square)
        )
    for hardware in sorted({hardware for hardware, _ in maps}):
        concurrent = maps.get((hardware, "concurrent"), {})
        time_sliced = maps.get((hardware, "time_sliced"), {})
        differences = {
            key: _slo_percent(concurrent[key]) - _slo_percent(time_sliced[key])
            for key in common_keys(concurrent, time_sliced)
        }
        if differences:
            rows.append(
                (
                    f"{hardware}: concurrent minus time sliced, points",
                    differences,
                    _difference_square,
                )
            )
    panel = len(alphas) * _CELL + _GAP
    row = len(loads) * _CELL + 64
    width, height = _LEFT + len(scales) * panel, _TOP + len(rows) * row
    title = "SLO attainment of slo (%), and its lead over the best baseline (points)"
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="16" font-size="12">{title}</text>',
        '<text x="10" y="31">columns: alpha; rows: load (1 is 40 requests/s)</text>',
    ]
    for line, (name, values, square) in enumerate(rows):
        top = _TOP + line * row + 24
        parts.append(f'<text x="10" y="{top - 14}" font-weight="bold">{name}</text>')
        for down, load in enumerate(loads):
            y = top + 3 + down * _CELL + 20
            parts.append(f'<text x="{_LEFT - 32}" y="{y}">{load:g}</text>')
        for column, scale in enumerate(scales):
            left = _LEFT + column * panel
            parts.append(f'<text x="{left}" y="{top - 2}">SLO scale {scale:g}</text>')
            for across, alpha in enumerate(alphas):
                x, below = left + across * _CELL, top + len(loads) * _CELL + 12
                parts.append(f'<text x="{x + 8}" y="{below}">{alpha:g}</text>')
                for down, load in enumerate(loads):
                    value = values.get((scale, alpha, load))
                    if value is not None:
                        parts += _square_svg(square(value), x, top + 3 + down * _CELL)
    parts.append("</svg>")
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def common_keys(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """The keys in both, sorted."""
    return sorted(set(first) & set(second))


def _slo_percent(cell: Cell) -> float:
    return 100 * cell["slo_attainment"]["slo"]


def _attainment_square(cell: Cell) -> tuple[str, Sequence[str]]:
    shares = cell["slo_attainment"]
    share = shares["slo"]
    lead = 100 * (share - max(other for policy, other in shares.items() if policy != "slo"))
    shade = round(235 - 150 * share)
    border = "" if judge(cell)["passes"] else ' stroke="#c00" stroke-width="2"'
    fill = f'fill="rgb({shade},{min(235, shade + 50)},{shade})"{border}'
    return fill, (f"{100 * share:.0f}", f"{lead:+.1f}")


def _difference_square(points: float) -> tuple[str, Sequence[str]]:
    shade = round(235 - min(150.0, 10 * abs(points)))
    color = f"{shade},{shade},235" if points >= 0 else f"235,{shade},{shade}"
    return f'fill="rgb({color})"', (f"{points:+.1f}",)


def _square_svg(square: tuple[str, Sequence[str]], x: int, y: int) -> list[str]:
    fill, lines = square
    side = _CELL - 3
    texts = [
        f'<text x="{x + 3}" y="{y + 14 + 13 * n}" font-size="{10 - n}">{text}</text>'
        for n, text in enumerate(lines)
    ]
    return [f'<rect x="{x}" y="{y}" width="{side}" height="{side}" {fill}/>', *texts]
