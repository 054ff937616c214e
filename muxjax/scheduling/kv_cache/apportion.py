"""Division of a total into integers in proportion to weights."""

from __future__ import annotations

from collections.abc import Sequence


def apportion(total: int, weights: Sequence[float], minima: Sequence[int]) -> list[int]:
    """Divides `total` into integers in proportion to weights, each at least its minimum.

    Fractions are rounded by the largest remainder. Weights that are all zero count as equal.

    Returns:
      One integer for each weight; their sum is `total`. Empty without weights.

    Raises:
      ValueError: the sum of the minima exceeds the total.
    """
    if sum(minima) > total:
        raise ValueError(f"minima {list(minima)} exceed the total of {total}")
    if not weights:
        return []
    if not any(weights):
        weights = [1.0] * len(weights)
    # A proportional part below its minimum is raised to it, which lowers the other parts; repeat
    # until no other part falls below its minimum.
    at_minimum: set[int] = set()
    while True:
        rest = total - sum(minima[i] for i in at_minimum)
        weight = sum(w for i, w in enumerate(weights) if i not in at_minimum)
        exact = [
            minima[i] if i in at_minimum else (rest * w / weight if weight else 0.0)
            for i, w in enumerate(weights)
        ]
        below = {i for i, value in enumerate(exact) if i not in at_minimum and value < minima[i]}
        if not below:
            break
        at_minimum |= below
    parts = [max(minima[i], int(value)) for i, value in enumerate(exact)]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    index = 0
    while sum(parts) < total:
        parts[by_remainder[index % len(parts)]] += 1
        index += 1
    return parts
