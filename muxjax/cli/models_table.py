"""The output of `muxjax models`: a loaded fleet, or the digests of its files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from muxjax.errors import CheckpointError, DownloadError
from muxjax.models.download.verify import FileCheck, StoredDigests, find_digests
from muxjax.models.nn.params import param_shapes
from muxjax.progress import Bars

_COLUMNS = {
    "name": "model",
    "family": "family",
    "num_layers": "layers",
    "num_heads": "heads",
    "num_kv_heads": "KV heads",
    "head_dim": "head size",
    "num_params": "parameters",
    "param_bytes": "bytes",
    "dtype": "dtype",
    "max_model_len": "max length",
    "tokens_per_page": "tokens/page",
    "kv_pages_quota": "KV quota",
    "origin": "from",
}
"""Keys of a row and their headings. A quota is in pages, of the same size for all models."""
_BYTES = ("B", "kB", "MB", "GB", "TB")
_TEXT = ("name", "family", "dtype", "origin")


def describe_models(fleet: Any) -> list[dict[str, Any]]:
    """Returns a row for each model, with the keys of `_COLUMNS`."""
    quotas = fleet.stats()["models"]
    rows = []
    for name, model in fleet.models.items():
        config = model.config
        rows.append(
            {
                "name": name,
                "family": config.family,
                "num_layers": config.num_layers,
                "num_heads": config.num_heads,
                "num_kv_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "num_params": sum(math.prod(shape) for shape in param_shapes(config).values()),
                "param_bytes": model.param_bytes,
                "dtype": model.precision,
                "max_model_len": model.max_model_len,
                "tokens_per_page": model.layout.tokens_per_page,
                "kv_pages_quota": quotas[name]["kv_pages_quota"],
                "origin": model.origin,
            }
        )
    return rows


def build_table(rows: list[dict[str, Any]]) -> Table:
    """Builds the table of the rows, with large numbers shortened."""
    table = Table(box=None, pad_edge=False)
    for key, heading in _COLUMNS.items():
        left = key in _TEXT
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(key, row[key]) for key in _COLUMNS))
    return table


def _cell(key: str, value: object) -> str:
    if key == "num_params":
        return _short(value, 1000, ("", "K", "M", "B", "T"))
    if key == "param_bytes":
        return _short(value, 1000, _BYTES)
    return str(value)


def _short(value: Any, step: int, units: tuple[str, ...]) -> str:
    number, unit = float(value), units[0]
    for unit in units:
        if number < step or unit == units[-1]:
            break
        number /= step
    return f"{number:.0f} {unit}".strip() if unit == units[0] else f"{number:.1f} {unit}"


def print_verified(sources: Mapping[str, str], as_json: bool) -> bool:
    """Checks the files of models against their digests, and prints the result.

    Args:
      sources: by model name, as in a fleet file.
      as_json: print JSON instead of a table.

    Returns:
      Whether all sources exist and no file is damaged or missing.
    """
    checks = _check_sources(dict.fromkeys(sources.values()))
    if as_json:
        rows = [
            {"model": name, "file": check.path, "state": check.state}
            | ({} if check.state == "ok" else {"remedy": check.remedy})
            for name, source in sources.items()
            for check in checks[source]
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        table = Table(box=None, pad_edge=False)
        for heading in ("model", "files", "digests"):
            table.add_column(heading, overflow="fold")
        for name, source in sources.items():
            table.add_row(name, str(len(checks[source])), _summarize(checks[source]))
        Console().print(table)
    bad = [check for files in checks.values() for check in files if check.state != "ok"]
    for check in bad:
        print(f"muxjax: {check.message}", file=sys.stderr)
    return not bad


def _check_sources(sources: Iterable[str]) -> dict[str, list[FileCheck]]:
    """Checks the files of each source; one that does not exist counts as a missing file."""
    checks: dict[str, list[FileCheck]] = {}
    stored: dict[str, StoredDigests] = {}
    for source in sources:
        try:
            stored[source] = find_digests(source)
        except (CheckpointError, DownloadError) as error:
            checks[source] = [FileCheck(source, "missing", str(error))]
    total = sum(digests.num_bytes for digests in stored.values())
    print(f"checking {_short(total, 1000, _BYTES)}", file=sys.stderr)
    with Bars({"checking": total}, show=True) as bars:
        for source, digests in stored.items():
            checks[source] = digests.check(partial(_advance, bars, source))
    return checks


def _advance(bars: Bars, source: str, size: int) -> None:
    bars.advance("checking", size, source)


def _summarize(checks: list[FileCheck]) -> str:
    wrong = [check.state for check in checks if check.state != "ok"]
    if wrong:
        return ", ".join(f"{wrong.count(state)} {state}" for state in dict.fromkeys(wrong))
    return "ok" if checks else "none stored"
