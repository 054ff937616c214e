"""Renders a folder of results as one HTML page with tables and plots, and as PNG files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from muxjax.bench.report.saved import SavedReport
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
class WrittenReport:
    """The files of a report.

    Attributes:
      page: the HTML file.
      pictures: PNG files; empty without matplotlib.
      drawn: whether matplotlib is installed.
    """

    page: Path
    pictures: tuple[Path, ...]
    drawn: bool


def build_grids(results: Sequence[SavedReport]) -> Iterator[Grid]:
    """Builds all tables.

    Raises:
      BenchError: a file lacks required fields.
    """
    for result in results:
        yield from _grids(result)


def write_report(results: Sequence[SavedReport], folder: Path) -> WrittenReport:
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
        for result in results:
            parts.append(f"<h2>{html.escape(str(result.path))}</h2>")
            for grid in _grids(result):
                parts.append(_table(grid))
            picture = _picture(result) if drawn else None
            if isinstance(picture, bytes):
                path = folder / f"{_unique_name(result.path.stem, names)}.png"
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
    return WrittenReport(page, tuple(pictures), drawn)


def _grids(result: SavedReport) -> list[Grid]:
    try:
        return list(GRIDS[result.kind](result.report))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BenchError(
            f"{result.path}: not a result of `muxjax bench`: {type(error).__name__}: {error}"
        ) from error


def _picture(result: SavedReport) -> bytes | bool | None:
    """Returns a PNG; None if there is nothing to plot; False without matplotlib."""
    from muxjax.bench.report.plots import plot

    try:
        figure = plot(result.kind, result.report)
    except ImportError:
        return False
    if figure is None:
        return None
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _unique_name(name: str, taken: set[str]) -> str:
    """Returns the name, with a number if the name is taken."""
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}-{count}"
    taken.add(unique)
    return unique


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
