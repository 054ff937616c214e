"""Costs from a measured table, in the format of MuxServe's profiles (`examples/placement`).

The file is JSON: `model -> devices -> percent of compute -> batch -> length -> {prefill, decoding}`
in milliseconds, -1 where it was not run. A prefill step has `batch x length` tokens; a decode step
makes one token for each of `batch` sequences that hold `length` tokens.

Between measured points the time is linear in the batch, in the length and in the share of compute;
so it is at the points what was measured. Outside them:
- below the smallest batch or length it is that of the smallest: steps do not get shorter than what
  launching them takes;
- above the largest, and in cells that were not run, it goes on along the line through the last two
  points, in the batch first; never below the last point;
- below the smallest share it grows as the share shrinks.

A profile of `muxjax bench steps` has, beside its models, what it measured of the engine's own steps
under `_steps` (`step_times.py`), which simulations take in place of the table.
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
"""The key of what is not a model but the engine's own steps."""


@dataclass(frozen=True)
class Surface:
    """Seconds over batch and length, of one model, degree, share and phase.

    Attributes:
      batches, lengths: the grid, ascending.
      rows: seconds by batch, then by length; no holes.
    """

    batches: tuple[float, ...]
    lengths: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]

    def at(self, batch: float, length: float) -> float:
        """Seconds at any point, interpolated or continued."""
        row, up = _place(self.batches, batch)
        column, right = _place(self.lengths, length)
        low, high = self.rows[row], self.rows[row + 1] if up else self.rows[row]
        near = low[column] + up * (high[column] - low[column])
        if not right:
            return near
        far = low[column + 1] + up * (high[column + 1] - low[column + 1])
        return near + right * (far - near)


def _place(grid: tuple[float, ...], value: float) -> tuple[int, float]:
    """The interval of the grid, and how far along it: above 1 beyond the last point."""
    if value <= grid[0] or len(grid) == 1:
        return 0, 0.0
    index = min(bisect_right(grid, value), len(grid) - 1) - 1
    return index, (value - grid[index]) / (grid[index + 1] - grid[index])


class ProfileTable:
    """A `CostModel` that reads a measured profile.

    Args:
      profile: the file's path, or its contents.
      shapes: of models in the profile, for their bytes; LLaMA's are known. Models of the profile
        whose shape is not known are checked and left out.

    Raises:
      ProfileError: a file that cannot be read, a value that is no time (NaN, zero, ...), or a table
        with nothing in it. The message says where.
    """

    def __init__(
        self,
        profile: str | os.PathLike[str] | Mapping[str, Any],
        shapes: Mapping[str, ModelShape] | None = None,
    ) -> None:
        shapes = {**LLAMA_SHAPES, **(shapes or {})}
        read = profile if isinstance(profile, Mapping) else _read(Path(profile))
        data = {name: degrees for name, degrees in read.items() if name != STEPS}
        self.raw: Mapping[str, Any] = data
        """The models' tables, which the estimator of upstream reads in its own way."""
        self.step_times = _step_times(read.get(STEPS, {}))
        """The engine's own steps, of models for which they were measured."""
        self._surfaces: dict[tuple[str, int, Phase], dict[float, Surface]] = {}
        self._shapes: dict[str, ModelShape] = {}
        if not data:
            raise ProfileError("the profile has no models")
        for model, degrees in data.items():
            if model in shapes:
                self._shapes[model] = shapes[model]
            for tp, shares in _items(degrees, model):
                for percent, cells in _items(shares, f"{model}, {tp:g} devices"):
                    where = f"{model}, {tp:g} devices, {percent:g} % of compute"
                    table = {b: dict(_items(row, where)) for b, row in _items(cells, where)}
                    for phase in _PHASES:
                        surfaces = self._surfaces.setdefault((model, int(tp), phase), {})
                        surfaces[percent / 100] = _surface(table, phase, where)
        self._degrees = {
            model: tuple(
                sorted(
                    tp for name, tp, phase in self._surfaces if name == model and phase == "prefill"
                )
            )
            for model in self._shapes
        }
        self._at_share = lru_cache(maxsize=None)(self._make_at_share)

    @property
    def models(self) -> tuple[str, ...]:
        """The names in the profile."""
        return tuple(self._shapes)

    def shape(self, model: str) -> ModelShape:
        """The sizes of a model."""
        return self._shapes[model]

    def tp_degrees(self, model: str) -> tuple[int, ...]:
        """The numbers of devices that were measured."""
        return self._degrees[model]

    def shares(self, model: str, tp: int) -> tuple[float, ...]:
        """The shares of compute that were measured, ascending."""
        return tuple(sorted(self._surfaces[model, tp, "decoding"]))

    def prefill_seconds(
        self, model: str, num_tokens: float, length: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """See `CostModel`."""
        length = min(length, num_tokens)
        if length <= 0:
            return 0.0
        return self._at_share(model, tp, "prefill", share).at(num_tokens / length, length)

    def decode_seconds(
        self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """See `CostModel`."""
        return self._at_share(model, tp, "decoding", share).at(batch, context)

    def weight_bytes(self, model: str, *, tp: int = 1) -> float:
        """See `CostModel`."""
        return self._shapes[model].weight_bytes(tp)

    def kv_bytes_per_token(self, model: str, *, tp: int = 1) -> float:
        """See `CostModel`."""
        return self._shapes[model].kv_bytes_per_token(tp)

    def _make_at_share(self, model: str, tp: int, phase: Phase, share: float) -> Surface:
        """The surface at any share: on the union of its neighbours' grids."""
        if not 0 < share <= 1:
            raise ValueError(f"a share of compute is above 0 and at most 1, not {share}")
        measured = self._surfaces[model, tp, phase]
        shares = sorted(measured)
        if share in measured:
            return measured[share]
        if share < shares[0] or len(shares) == 1:
            return _combined([(measured[shares[0]], shares[0] / share)])
        index = min(bisect_right(shares, share), len(shares) - 1) - 1
        low, high = shares[index], shares[index + 1]
        along = (share - low) / (high - low)
        if along > 1:  # more compute than was measured: as the most
            return measured[high]
        return _combined([(measured[low], 1 - along), (measured[high], along)])


def _combined(parts: Sequence[tuple[Surface, float]]) -> Surface:
    """A weighted sum of surfaces."""
    batches = tuple(sorted({b for surface, _ in parts for b in surface.batches}))
    lengths = tuple(sorted({n for surface, _ in parts for n in surface.lengths}))
    rows = tuple(
        tuple(sum(weight * surface.at(b, n) for surface, weight in parts) for n in lengths)
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
        raise ProfileError(f"{path}: not a profile: a mapping from models is needed")
    return data


def _step_times(steps: object) -> dict[str, StepTimes]:
    if not isinstance(steps, Mapping):
        raise ProfileError(f"profile: {STEPS} must be a mapping from models")
    return {name: StepTimes.from_json(times, name) for name, times in steps.items()}


def _items(mapping: object, where: str) -> list[tuple[float, Any]]:
    """A mapping's items in the order of its keys, which must be positive numbers."""
    if not isinstance(mapping, Mapping) or not mapping:
        raise ProfileError(f"profile of {where}: a mapping with numbers as keys is needed")
    found = []
    for key, value in mapping.items():
        try:
            number = float(key)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise ProfileError(f"profile of {where}: {key!r} is not a positive number")
        found.append((number, value))
    return sorted(found, key=lambda item: item[0])


def _surface(table: Mapping[float, Mapping[float, Any]], phase: Phase, where: str) -> Surface:
    lengths = sorted({n for row in table.values() for n in row})
    known: dict[tuple[float, float], float] = {}
    for b, row in table.items():
        for n, cell in row.items():
            value = cell.get(phase, -1) if isinstance(cell, Mapping) else None
            here = f"{where}, batch {b:g}, length {n:g}, {phase}"
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ProfileError(f"profile of {here}: a number of milliseconds is needed")
            if value == -1:
                continue
            if not (math.isfinite(value) and value > 0):
                raise ProfileError(
                    f"profile of {here}: {value} is no time; measure it again, or write -1 for "
                    "not run"
                )
            known[b, n] = value / 1000
    batches = [b for b in table if any((b, n) in known for n in lengths)]
    lengths = [n for n in lengths if any((b, n) in known for b in batches)]
    if not known:
        raise ProfileError(f"profile of {where}: no {phase} step was measured")
    columns: list[list[float]] = []
    for n in lengths:
        below = columns[-1] if columns else [1.0] * len(batches)
        columns.append(_filled(batches, [known.get((b, n)) for b in batches], below))
    rows = zip(*columns, strict=True)
    return Surface(tuple(batches), tuple(lengths), tuple(tuple(row) for row in rows))


def _filled(
    grid: Sequence[float], values: Sequence[float | None], alike: Sequence[float]
) -> list[float]:
    """Values with the holes filled from the line through the two known points nearest below them,
    or where there are not two, in proportion to the values of a column that is alike.
    """
    filled: list[float] = []
    points = [(b, value) for b, value in zip(grid, values, strict=True) if value is not None]
    for index, (b, value) in enumerate(zip(grid, values, strict=True)):
        if value is not None:
            filled.append(value)
            continue
        around = [point for point in points if point[0] < b][-2:]
        above = next((point for point in points if point[0] > b), None)
        if around and above:
            (b0, t0), (b1, t1) = around[-1], above
        elif len(around) == 2:
            (b0, t0), (b1, t1) = around
            t1 = max(t0, t1)
        else:
            nearest = around[-1] if around else points[0]
            scale = nearest[1] / alike[grid.index(nearest[0])]
            filled.append(scale * alike[index])
            continue
        filled.append(t0 + (t1 - t0) * (b - b0) / (b1 - b0))
    return filled
