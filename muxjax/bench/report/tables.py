"""Tables of results, for the terminal and for HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Grid:
    """A table of text cells.

    Attributes:
      title, note: texts above and below the table.
      columns: headings; the first `left` columns are texts, the others numbers.
      rows: one text for each column.
      left: see `columns`.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    left: int = 1


def number(value: Any, digits: int = 3) -> str:
    """A number with few digits; a dash for None."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.{digits}g}"


def percentage(value: float | None) -> str:
    """A fraction as a percentage; a dash for None."""
    return "-" if value is None else f"{value:.1%}"


def serve_grids(report: Mapping[str, Any]) -> Iterator[Grid]:
    """Tables of `bench serve`: policies, and models by policy."""
    keys = {
        "total_throughput": "served/s",
        "rate_weighted_throughput": "weighted",
        "rate_weighted_goodput": "weighted goodput",
        "slo_attainment": "attainment",
        "jain_index": "Jain",
        "ttft_s_p50": "TTFT p50",
        "ttft_s_p99": "TTFT p99",
        "tpot_s_p99": "TPOT p99",
    }
    rows = []
    for policy, summary in report["medians"].items():
        cells = [policy, str(summary["rounds"])]
        for key in keys:
            if key in _WITH_SPREAD:
                cells.append(_spread(summary[key], percent=key == "slo_attainment"))
            else:
                cells.append(number((summary[key] or {}).get("median")))
        rows.append(tuple(cells))
    offered = report["workload"]["offered"]
    yield Grid(
        f"{report['fleet']}: {offered} requests",
        ("policy", "rounds", *keys.values()),
        rows,
        "medians of the complete rounds (lowest to highest); requests/s, seconds",
    )
    rows = []
    for policy in report["medians"]:
        runs = [run for run in report["runs"] if run["policy"] == policy and not run["interrupted"]]
        for name in runs[0]["models"]:
            models = [run["models"][name] for run in runs]
            rows.append(
                (
                    policy,
                    name,
                    str(models[0]["requests"]),
                    _median_text([model["throughput"] for model in models]),
                    percentage(_median([model["slo_attainment"] for model in models])),
                    _median_text([model["ttft_s"]["p50"] for model in models]),
                    _median_text([model["ttft_s"]["p99"] for model in models]),
                    _median_text([model["tpot_s"]["p99"] for model in models]),
                )
            )
    columns = ("policy", "model", "requests", "served/s", "attainment", "TTFT p50", "TTFT p99")
    yield Grid("models", (*columns, "TPOT p99"), rows, "medians; seconds", left=2)


def http_grids(report: Mapping[str, Any]) -> Iterator[Grid]:
    """Tables of `bench http` and of vLLM's results: all models, and each model."""
    blocks = {"all": report, **report.get("models", {})}
    times = [key for key in report if key.endswith("_ms")]
    plain = {
        "completed": "completed",
        "failed": "failed",
        "request_throughput": "requests/s",
        "request_goodput": "goodput/s",
        "slo_attainment": "attainment",
        "output_throughput": "output tokens/s",
        "total_token_throughput": "tokens/s",
    }
    rows = []
    for name, block in blocks.items():
        cells = [name]
        for key in plain:
            value = block.get(key)
            cells.append(percentage(value) if key == "slo_attainment" else number(value, 4))
        rows.append(tuple(cells))
    notes = [f"{number(report['duration'])} s"]
    if report.get("jain_index") is not None:
        notes.append(f"Jain index {number(report['jain_index'])}")
    counting = report.get("prompt_tokens_by", {})
    if "words" in counting.values():
        notes.append("prompt lengths are approximate: each word counts as a token")
    if report.get("approximate_output_tokens"):
        notes.append("output tokens are counted by events: the server does not report them")
    if report.get("interrupted"):
        notes.append(f"interrupted: {report['interrupted']} requests left out")
    title = str(report.get("label") or report.get("model_id") or "run")
    yield Grid(title, ("model", *plain.values()), rows, "; ".join(notes))
    rows = [
        (key.removesuffix("_ms"), *(number(block.get(key), 4) for block in blocks.values()))
        for key in times
    ]
    yield Grid("latencies in ms", ("", *blocks), rows)


def steps_grids(report: Mapping[str, Any]) -> Iterator[Grid]:
    """The table of `bench steps`."""
    rows = [
        (
            step["model"],
            step["phase"] if step["samples"] else "prefill, no sampling",
            str(step["bucket"]),
            f"{step['chunks']} chunks" if "chunks" in step else f"{step['tokens']} tokens",
            str(step["context"]),
            number(step["median_ms"]),
            percentage((step["highest_ms"] - step["lowest_ms"]) / step["median_ms"]),
        )
        for step in report["steps"]
    ]
    columns = ("model", "phase", "bucket", "parts", "context", "ms", "spread")
    yield Grid("steps", columns, rows, "medians; spread: maximum minus minimum", left=2)


def simulation_grids(report: Mapping[str, Any]) -> Iterator[Grid]:
    """The table of `muxjax simulate`."""
    rows = [
        (
            policy["policy"],
            number(run["offered_rate"]),
            number(run["total_throughput"]),
            number(run["rate_weighted_throughput"]),
            number(run["request_goodput"]),
            percentage(run["slo_attainment"]),
            number(run["ttft_s"]["p99"]),
            number(run["tpot_s"]["p99"]),
        )
        for policy in report["policies"]
        for run in policy["runs"]
    ]
    columns = ("policy", "rate", "served/s", "weighted", "goodput", "attainment", "TTFT p99")
    yield Grid("simulated", (*columns, "TPOT p99"), rows, "requests/s and seconds")


_WITH_SPREAD = ("rate_weighted_goodput", "slo_attainment")
GRIDS = {
    "serve": serve_grids,
    "http": http_grids,
    "steps": steps_grids,
    "simulation": simulation_grids,
}


def show_grids(grids: Iterator[Grid] | Sequence[Grid]) -> None:
    """Prints tables."""
    console = Console()
    wide = Console(width=max(110, console.width))
    for grid in grids:
        table = Table(title=grid.title, caption=grid.note or None)
        for index, column in enumerate(grid.columns):
            justify = "left" if index < grid.left else "right"
            table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for row in grid.rows:
            table.add_row(*row)
        wide.print(table)


def show_serve(report: Mapping[str, Any]) -> None:
    """Prints the tables of `bench serve`."""
    show_grids(serve_grids(report))


def show_http(report: Mapping[str, Any]) -> None:
    """Prints the tables of `bench http`."""
    show_grids(http_grids(report))


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def _median_text(values: Sequence[float | None]) -> str:
    return number(_median(values))


def _spread(value: Mapping[str, float] | None, *, percent: bool) -> str:
    if value is None:
        return "-"
    texts = [
        percentage(value[k]) if percent else number(value[k])
        for k in ("median", "lowest", "highest")
    ]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]}-{texts[2]})"
