"""The output of `muxjax models`: a loaded fleet."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from muxjax.models.nn.params import param_shapes

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
        return _short(value, 1000, ("B", "kB", "MB", "GB", "TB"))
    return str(value)


def _short(value: Any, step: int, units: tuple[str, ...]) -> str:
    number, unit = float(value), units[0]
    for unit in units:
        if number < step or unit == units[-1]:
            break
        number /= step
    return f"{number:.0f} {unit}".strip() if unit == units[0] else f"{number:.1f} {unit}"
