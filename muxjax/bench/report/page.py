"""Renders a folder of results as one HTML page with tables and plots, and as PNG files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from muxjax.bench.report.saved import Saved
from muxjax.bench.report.tables import GRIDS, Grid
from muxjax.errors import BenchError

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
       color: #222; background: #fff; }
table { border-collapse: collapse; margin: 0.5rem 0 0.2rem; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; }
th.left, td.left { text-align: left; }
p.note { color: #555; margin: 0 0 1rem; }
div.wide { overflow-x: auto; }
img { max-width: 100%; }
"""


@dataclass(frozen=True)
class Written:
    """The files of a report.

    Attributes:
      page: the HTML file.
      pictures: PNG files; empty without matplotlib.
      drawn: whether matplotlib is installed.
    """

    page: Path
    pictures: tuple[Path, ...]
    drawn: bool


def build_grids(saved: Sequence[Saved]) -> Iterator[Grid]:
    """Builds all tables.

    Raises:
      BenchError: a file lacks required fields.
    """
    for found in saved:
        yield from _grids(found)


def write_report(saved: Sequence[Saved], folder: Path) -> Written:
    """Writes a self-contained `report.html`, and a PNG for each result.

    Raises:
      BenchError: a result lacks required fields, or a file cannot be written.
    """
    parts: list[str] = []
    pictures: list[Path] = []
    drawn = True
    names: set[str] = set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for found in saved:
            parts.append(f"<h2>{html.escape(str(found.path))}</h2>")
            for grid in _grids(found):
                parts.append(_table(grid))
            picture = _picture(found) if drawn else None
            if isinstance(picture, bytes):
                path = folder / f"{_free(found.path.stem, names)}.png"
                path.write_bytes(picture)
                pictures.append(path)
                data = base64.b64encode(picture).decode()
                parts.append(
                    f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
                )
            drawn = drawn and picture is not False
        page = folder / "report.html"
        page.write_text(
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
            f"<title>MuxJAX benchmarks</title><style>{_STYLE}</style></head><body>\n"
            "<h1>Benchmarks</h1>\n" + "\n".join(parts) + "\n</body></html>\n",
            encoding="utf-8",
        )
    except OSError as error:
        raise BenchError(f"{folder}: cannot be written: {error}") from error
    return Written(page, tuple(pictures), drawn)


def _grids(found: Saved) -> list[Grid]:
    try:
        return list(GRIDS[found.kind](found.report))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BenchError(
            f"{found.path}: not a result as `muxjax bench` writes it: "
            f"{type(error).__name__}: {error}"
        ) from error


def _picture(found: Saved) -> bytes | bool | None:
    """Returns a PNG; None if there is nothing to plot; False without matplotlib."""
    from muxjax.bench.report.plots import plot

    try:
        figure = plot(found.kind, found.report)
    except ImportError:
        return False
    if figure is None:
        return None
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _free(name: str, taken: set[str]) -> str:
    """Returns the name, with a number if the name is taken."""
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}-{count}"
    taken.add(found)
    return found


def _table(grid: Grid) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=left' if index < grid.left else ''}>{html.escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )

    body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in grid.rows)
    note = f'<p class="note">{html.escape(grid.note)}</p>' if grid.note else ""
    return (
        f'<div class="wide"><table><caption>{html.escape(grid.title)}</caption>'
        f"<thead><tr>{row(grid.columns, 'th')}</tr></thead>\n<tbody>{body}</tbody></table></div>"
        f"{note}"
    )
