"""Costs from a measured table, in the format of MuxServe's profiles (`examples/placement`).

The file is JSON: `model -> devices -> percent of compute -> batch -> length -> {prefill, decoding}`
in milliseconds, -1 for cells that were not run. A prefill step has `batch x length` tokens; a
decode step generates one token for each of `batch` sequences that hold `length` tokens.

Between measured points the time is interpolated linearly in the batch, the length and the compute
share. Elsewhere:
- Below the smallest batch or length, the time is constant, because a step takes at least its launch
  overhead.
- Above the largest, and for cells that were not run, the time is extrapolated along the last two
  points, first in the batch. It never falls below the last point.
- Below the smallest share, the time is inversely proportional to the share.

A profile of `muxjax bench steps` also has measured times of the engine's compiled steps under
`_steps` (`step_times.py`). Simulations use them instead of the table.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from muxjax.errors import ProfileError
from muxjax.placement.costs.model_shape import LLAMA_SHAPES, ModelShape
from muxjax.placement.costs.step_times import StepTimes

Phase = Literal["prefill", "decoding"]
_PHASES: tuple[Phase, ...] = ("prefill", "decoding")
STEPS = "_steps"
"""The key of the engine's step times. All other keys of a profile are models."""


@dataclass(frozen=True)
class Surface:
    """Seconds by batch and length for one model, `tp`, compute share and phase.

    Attributes:
      batches, lengths: the grid, ascending.
      rows: seconds by batch, then by length; without gaps.
    """

    batches: tuple[float, ...]
    lengths: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]

    def seconds(self, batch: float, length: float) -> float:
        """Seconds at any point, interpolated or extrapolated."""
        row, y = _locate(self.batches, batch)
        column, x = _locate(self.lengths, length)
        low, high = self.rows[row], self.rows[row + 1] if y else self.rows[row]
        left = low[column] + y * (high[column] - low[column])
        if not x:
            return left
        right = low[column + 1] + y * (high[column + 1] - low[column + 1])
        return left + x * (right - left)


def _locate(grid: tuple[float, ...], value: float) -> tuple[int, float]:
    """Index of the grid interval of a value, and the position in it (above 1 beyond the grid)."""
    if value <= grid[0] or len(grid) == 1:
        return 0, 0.0
    index = min(bisect_right(grid, value), len(grid) - 1) - 1
    return index, (value - grid[index]) / (grid[index + 1] - grid[index])


class ProfileTable:
    """A cost model from a measured profile.

    Args:
      profile: the file's path, or its contents.
      shapes: shapes of the profile's models, to compute their bytes; LLaMA shapes are built in.
        Models of the profile without a shape are validated and then ignored.

    Attributes:
      raw: the models' tables as in the file, for MuxServe's own estimator.
      step_times: measured times of the engine's compiled steps by model; may be empty.

    Raises:
      ProfileError: a file that cannot be read, a value that is not a time (NaN, zero, ...), or an
        empty table. The message names the cell.
    """

    def __init__(
        self,
        profile: str | os.PathLike[str] | Mapping[str, Any],
        shapes: Mapping[str, ModelShape] | None = None,
    ) -> None:
        shapes = {**LLAMA_SHAPES, **(shapes or {})}
        contents = profile if isinstance(profile, Mapping) else _read(Path(profile))
        data = {name: table for name, table in contents.items() if name != STEPS}
        self.raw: Mapping[str, Any] = data
        self.step_times = _step_times(contents.get(STEPS, {}))
        self._surfaces: dict[tuple[str, int, Phase], dict[float, Surface]] = {}
        self._shapes: dict[str, ModelShape] = {}
        if not data:
            raise ProfileError("the profile has no models")
        for model, by_devices in data.items():
            if model in shapes:
                self._shapes[model] = shapes[model]
            for tp, shares in _items(by_devices, model):
                for percent, cells in _items(shares, f"{model}, {tp:g} devices"):
                    where = f"{model}, {tp:g} devices, {percent:g} % of compute"
                    table = {b: dict(_items(row, where)) for b, row in _items(cells, where)}
                    for phase in _PHASES:
                        surfaces = self._surfaces.setdefault((model, int(tp), phase), {})
                        surfaces[percent / 100] = _surface(table, phase, where)
        self._tp_sizes = {
            model: tuple(
                sorted(
                    tp for name, tp, phase in self._surfaces if name == model and phase == "prefill"
                )
            )
            for model in self._shapes
        }
        self._surface_at_share = lru_cache(maxsize=None)(self._interpolate_share)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the profile's models with a known shape."""
        return tuple(self._shapes)

    def shape(self, model: str) -> ModelShape:
        """The sizes of a model."""
        return self._shapes[model]

    def tp_sizes(self, model: str) -> tuple[int, ...]:
        """The measured numbers of devices, ascending."""
        return self._tp_sizes[model]

    def shares(self, model: str, tp: int) -> tuple[float, ...]:
        """The measured compute shares, ascending."""
        return tuple(sorted(self._surfaces[model, tp, "decoding"]))

    def prefill_seconds(
        self, model: str, num_tokens: float, length: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """See `CostModel`."""
        length = min(length, num_tokens)
        if length <= 0:
            return 0.0
        surface = self._surface_at_share(model, tp, "prefill", share)
        return surface.seconds(num_tokens / length, length)

    def decode_seconds(
        self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """See `CostModel`."""
        return self._surface_at_share(model, tp, "decoding", share).seconds(batch, context)

    def weight_bytes(self, model: str, *, tp: int = 1) -> float:
        """See `CostModel`."""
        return self._shapes[model].weight_bytes(tp)

    def kv_bytes_per_token(self, model: str, *, tp: int = 1) -> float:
        """See `CostModel`."""
        return self._shapes[model].kv_bytes_per_token(tp)

    def _interpolate_share(self, model: str, tp: int, phase: Phase, share: float) -> Surface:
        """Interpolates the surface at any share, on the union of the neighbors' grids."""
        if not 0 < share <= 1:
            raise ValueError(f"a compute share must be above 0 and at most 1, not {share}")
        measured = self._surfaces[model, tp, phase]
        shares = sorted(measured)
        if share in measured:
            return measured[share]
        if share < shares[0] or len(shares) == 1:
            return _weighted_sum([(measured[shares[0]], shares[0] / share)])
        index = min(bisect_right(shares, share), len(shares) - 1) - 1
        low, high = shares[index], shares[index + 1]
        position = (share - low) / (high - low)
        if position > 1:  # beyond the largest measured share
            return measured[high]
        return _weighted_sum([(measured[low], 1 - position), (measured[high], position)])


def _weighted_sum(parts: Sequence[tuple[Surface, float]]) -> Surface:
    """A weighted sum of surfaces."""
    batches = tuple(sorted({b for surface, _ in parts for b in surface.batches}))
    lengths = tuple(sorted({n for surface, _ in parts for n in surface.lengths}))
    rows = tuple(
        tuple(sum(weight * surface.seconds(b, n) for surface, weight in parts) for n in lengths)
        for b in batches
    )
    return Surface(batches, lengths, rows)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, not JSON
        raise ProfileError(f"{path}: not a profile: {error}") from error
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: not a profile: must be an object with models as keys")
    return data


def _step_times(steps: object) -> dict[str, StepTimes]:
    if not isinstance(steps, Mapping):
        raise ProfileError(f"profile: {STEPS} must be an object with models as keys")
    return {name: StepTimes.from_json(times, name) for name, times in steps.items()}


def _items(mapping: object, where: str) -> list[tuple[float, Any]]:
    """The items of a mapping in the order of its keys, which must be positive numbers."""
    if not isinstance(mapping, Mapping) or not mapping:
        raise ProfileError(f"profile of {where}: must be an object with numbers as keys")
    items = []
    for key, value in mapping.items():
        try:
            number = float(key)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise ProfileError(f"profile of {where}: {key!r} is not a positive number")
        items.append((number, value))
    return sorted(items, key=lambda item: item[0])


def _surface(table: Mapping[float, Mapping[float, Any]], phase: Phase, where: str) -> Surface:
    lengths = sorted({n for row in table.values() for n in row})
    known: dict[tuple[float, float], float] = {}
    for b, row in table.items():
        for n, cell in row.items():
            value = cell.get(phase, -1) if isinstance(cell, Mapping) else None
            cell_name = f"{where}, batch {b:g}, length {n:g}, {phase}"
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ProfileError(f"profile of {cell_name}: must be a number of milliseconds")
            if value == -1:
                continue
            if not (math.isfinite(value) and value > 0):
                raise ProfileError(
                    f"profile of {cell_name}: {value} is not a time; measure it again, or write "
                    "-1 for a cell that was not run"
                )
            known[b, n] = value / 1000
    batches = [b for b in table if any((b, n) in known for n in lengths)]
    lengths = [n for n in lengths if any((b, n) in known for b in batches)]
    if not known:
        raise ProfileError(f"profile of {where}: no {phase} step was measured")
    columns: list[list[float]] = []
    for n in lengths:
        shorter = columns[-1] if columns else [1.0] * len(batches)
        columns.append(_fill_gaps(batches, [known.get((b, n)) for b in batches], shorter))
    rows = zip(*columns, strict=True)
    return Surface(tuple(batches), tuple(lengths), tuple(tuple(row) for row in rows))


def _fill_gaps(
    grid: Sequence[float], values: Sequence[float | None], similar: Sequence[float]
) -> list[float]:
    """Fills gaps linearly from the known neighbors, or from the two nearest points below.

    With fewer known points, the values of a similar column are scaled.
    """
    filled: list[float] = []
    points = [(b, value) for b, value in zip(grid, values, strict=True) if value is not None]
    for index, (b, value) in enumerate(zip(grid, values, strict=True)):
        if value is not None:
            filled.append(value)
            continue
        below = [point for point in points if point[0] < b][-2:]
        above = next((point for point in points if point[0] > b), None)
        if below and above:
            (b0, t0), (b1, t1) = below[-1], above
        elif len(below) == 2:
            (b0, t0), (b1, t1) = below
            t1 = max(t0, t1)
        else:
            nearest = below[-1] if below else points[0]
            scale = nearest[1] / similar[grid.index(nearest[0])]
            filled.append(scale * similar[index])
            continue
        filled.append(t0 + (t1 - t0) * (b - b0) / (b1 - b0))
    return filled
