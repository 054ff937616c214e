"""Draws a Chrome trace as an SVG: a row for each track, a box for each step, lines for the pool.

The SVG is written directly, so that no plotting library is needed. Each model has a color, dark for
prefills and light for decodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from muxjax.errors import BenchError

_COLORS = ("#4477aa", "#cc6677", "#228833", "#aa7722", "#66589a", "#2a8f9d")
_LEFT, _WIDTH, _ROW, _CHART = 130, 820, 18, 70


def trace_picture(
    path: Path, *, start: float = 0.0, seconds: float | None = None, title: str = ""
) -> str:
    """Draws a part of a trace.

    Args:
      path: the trace (JSON); only its first unit is drawn.
      start: start of the part, in seconds.
      seconds: length of the part; by default to the end of the trace.
      title: heading of the picture.

    Raises:
      BenchError: the file is not a trace, or the part has no step.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: not a Chrome trace: {error}") from error
    pid = min((event["pid"] for event in events if event["ph"] == "X"), default=None)
    unit_events = [event for event in events if event.get("pid") == pid]
    end = max(
        (event["ts"] + event["dur"] for event in unit_events if event["ph"] == "X"), default=0.0
    )
    first = 1e6 * start
    last = end if seconds is None else min(end, first + 1e6 * seconds)
    steps = [
        event
        for event in unit_events
        if event["ph"] == "X" and event["ts"] < last and event["ts"] + event["dur"] > first
    ]
    if not steps:
        raise BenchError(f"{path}: no steps after {start:g} s; the trace ends at {end / 1e6:g} s")
    return _svg(unit_events, steps, first, last, title)


def _svg(
    events: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    first: float,
    last: float,
    title: str,
) -> str:
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    order = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    used = sorted({step["tid"] for step in steps}, key=lambda tid: order.get(tid, tid))
    models = list(dict.fromkeys(tracks[tid].rsplit(" ", 1)[0] for tid in sorted(tracks)))
    top = 26 if title else 8
    bottom = top + _ROW * len(used)
    charts = [
        (name, _values(events, name, models, first, last))
        for name in ("waiting", "running", "pages")
    ]
    height = bottom + (_CHART + 10) * len(charts) + 24
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 20}" height="{height}" '
        f'font-family="sans-serif" font-size="11">'
    )
    parts = [
        head,
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    if title:
        parts.append(f'<text x="{_LEFT}" y="16" font-size="13">{escape(title)}</text>')

    def x(time: float) -> float:
        return _LEFT + _WIDTH * (min(max(time, first), last) - first) / (last - first)

    for row, tid in enumerate(used):
        y = top + _ROW * row
        model, phase = tracks[tid].rsplit(" ", 1)
        color = _COLORS[models.index(model) % len(_COLORS)]
        opacity = 1.0 if phase == "prefill" else 0.55
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 13}" text-anchor="end">{escape(tracks[tid])}</text>'
        )
        for step in steps:
            if step["tid"] != tid:
                continue
            left, right = x(step["ts"]), x(step["ts"] + step["dur"])
            parts.append(
                f'<rect x="{left:.1f}" y="{y + 2}" width="{max(0.4, right - left - 0.2):.1f}" '
                f'height="{_ROW - 4}" fill="{color}" opacity="{opacity}"/>'
            )
    for index, (name, lines) in enumerate(charts):
        y = bottom + (_CHART + 10) * index + 8
        highest = max((value for line in lines.values() for _, value in line), default=0) or 1
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 12}" text-anchor="end">{name}</text>'
            f'<text x="{_LEFT - 6}" y="{y + 26}" text-anchor="end" fill="#777">'
            f"up to {highest}</text>"
            f'<line x1="{_LEFT}" y1="{y + _CHART}" x2="{_LEFT + _WIDTH}" y2="{y + _CHART}" '
            f'stroke="#bbb"/>'
        )
        for model, line in lines.items():
            parts.append(_stairs(line, x, y, highest, _COLORS[models.index(model) % len(_COLORS)]))
    for tick in range(6):
        time = first + (last - first) * tick / 5
        parts.append(
            f'<text x="{x(time):.1f}" y="{height - 6}" text-anchor="middle" fill="#555">'
            f"{(time - first) / 1e6:.2f} s</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _values(
    events: Sequence[Mapping[str, Any]], name: str, models: Sequence[str], first: float, last: float
) -> dict[str, list[tuple[float, int]]]:
    """Each model's values of a counter, at the times when they change."""
    lines: dict[str, list[tuple[float, int]]] = {model: [(first, 0)] for model in models}
    for event in events:
        if event["ph"] != "C" or event["name"] != name or event["ts"] > last:
            continue
        for model, value in event["args"].items():
            line = lines[model]
            if event["ts"] <= first:
                line[0] = (first, value)
            elif line[-1][1] != value:
                line.append((event["ts"], value))
    for line in lines.values():
        line.append((last, line[-1][1]))
    return lines


def _stairs(line: Sequence[tuple[float, int]], x: Any, y: float, highest: int, color: str) -> str:
    path = []
    height = None
    for time, value in line:
        next_height = y + _CHART * (1 - value / highest)
        path.append(f"{x(time):.1f},{next_height if height is None else height:.1f}")
        path.append(f"{x(time):.1f},{next_height:.1f}")
        height = next_height
    return f'<polyline points="{" ".join(path)}" fill="none" stroke="{color}" stroke-width="1.3"/>'
