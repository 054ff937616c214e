"""Measures of fairness."""

from __future__ import annotations

from collections.abc import Iterable


def jain_index(values: Iterable[float]) -> float | None:
    """Jain's fairness index: 1 if all values are equal, `1/n` if only one of `n` is above 0.

    Source: R. Jain, D. Chiu, W. Hawe, DEC-TR-301, 1984.

    Returns:
      The index; None if there are no values or all are 0, since it is then undefined.
    """
    numbers = list(values)
    squares = sum([value * value for value in numbers])
    return sum(numbers) ** 2 / (len(numbers) * squares) if squares else None
