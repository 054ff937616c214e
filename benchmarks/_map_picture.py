"""The policy map as a picture: a square for each cell, in a panel for each SLO scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CELL, _GAP, _LEFT, _TOP = 34, 26, 70, 46


def draw(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes an SVG: what `slo` attains (shade and number), and how far ahead of the best baseline.

    Args:
      cells: of one map or of several, each of which becomes a row of panels.
      path: the file.
    """
    maps = sorted({(cell["hardware"], cell["execution"]) for cell in cells})
    alphas = sorted({cell["alpha"] for cell in cells})
    loads = sorted({cell["load"] for cell in cells})
    scales = sorted({cell["slo_scale"] for cell in cells})
    by_place = {
        (c["hardware"], c["execution"], c["slo_scale"], c["alpha"], c["load"]): c for c in cells
    }
    panel = len(alphas) * _CELL + _GAP
    row = len(loads) * _CELL + 64
    width, height = _LEFT + len(scales) * panel, _TOP + len(maps) * row
    title = "Requests within their target under slo (%), and points ahead of the best baseline"
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="16" font-size="12">{title}</text>',
        '<text x="10" y="31">across: alpha; down: load, parts of 40 requests/s</text>',
    ]
    for line, (hardware, execution) in enumerate(maps):
        top = _TOP + line * row + 24
        title = f"{hardware}, {execution.replace('_', ' ')}"
        parts.append(f'<text x="10" y="{top - 14}" font-weight="bold">{title}</text>')
        for column, scale in enumerate(scales):
            left = _LEFT + column * panel
            parts.append(f'<text x="{left}" y="{top - 2}">SLO scale {scale:g}</text>')
            for across, alpha in enumerate(alphas):
                x = left + across * _CELL
                parts.append(
                    f'<text x="{x + 8}" y="{top + len(loads) * _CELL + 12}">{alpha:g}</text>'
                )
                for down, load in enumerate(loads):
                    y = top + 3 + down * _CELL
                    if column == 0 and across == 0:
                        parts.append(f'<text x="{_LEFT - 32}" y="{y + 20}">{load:g}</text>')
                    cell = by_place.get((hardware, execution, scale, alpha, load))
                    if cell is not None:
                        parts += _square(cell, x, y)
    parts.append("</svg>")
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _square(cell: Mapping[str, Any], x: int, y: int) -> list[str]:
    shares = cell["slo_attainment"]
    ours = shares["slo"]
    ahead = 100 * (ours - max(share for policy, share in shares.items() if policy != "slo"))
    shade = round(235 - 150 * ours)
    border = ' stroke="#c00" stroke-width="2"' if ahead < -1 - 1e-9 else ""
    side = _CELL - 3
    fill = f'fill="rgb({shade},{min(235, shade + 50)},{shade})"'
    return [
        f'<rect x="{x}" y="{y}" width="{side}" height="{side}" {fill}{border}/>',
        f'<text x="{x + 3}" y="{y + 14}">{100 * ours:.0f}</text>',
        f'<text x="{x + 3}" y="{y + 27}" font-size="9">{ahead:+.1f}</text>',
    ]
