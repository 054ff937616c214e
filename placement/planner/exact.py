"""The best placement of a small fleet, by integer programming over all units that there could be.

A variable for each unit: a kind of node, a mesh size and a set of models (whole, or where there are
few of them also halves, which are replicas). Each model is placed once, meshes fit on the nodes.
Solved with HiGHS (Huangfu and Hall, Math. Prog. Comp. 2018) through SciPy. The units number
`2^models`, so this is for small fleets only; larger ones begin from construction (`search.py`).
"""

from __future__ import annotations

import itertools

import numpy as np

from muxjax.placement.planner.scorer import Items, Scorer
from muxjax.placement.planner.search import MeshBudget, Unit

MOST_UNITS = 1000
_MOST_WITH_HALVES = 250


def solve(scorer: Scorer) -> list[Unit] | None:
    """The best units, or None for a fleet that is too large, or that cannot be placed."""
    models = len(scorer.loads)
    sizes = sum(len(group.mesh_sizes()) for group in scorer.cluster.groups)
    if models > 16 or 2**models * sizes > MOST_UNITS:
        return None
    halves = scorer.cluster.num_devices > 1 and 3**models * sizes <= _MOST_WITH_HALVES
    parts = (0.0, 0.5, 1.0) if halves else (0.0, 1.0)
    units: list[Unit] = []
    for chosen in itertools.product(parts, repeat=models):
        items: Items = tuple((model, part) for model, part in enumerate(chosen) if part)
        for group, nodes in enumerate(scorer.cluster.groups):
            units += [
                (group, size, items, False)
                for size in nodes.mesh_sizes()
                if items and scorer.unit(group, size, items) is not None
            ]
    return _best(scorer, units) if units else None


def _best(scorer: Scorer, units: list[Unit]) -> list[Unit] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    values = []
    placed = np.zeros((len(scorer.loads), len(units)))
    slots: list[np.ndarray] = []
    most: list[float] = []
    for column, unit in enumerate(units):
        found = scorer.unit(*unit)
        assert found is not None
        values.append(found.value)
        for model, part in unit[2]:
            placed[model, column] = part
    for group, nodes in enumerate(scorer.cluster.groups):
        for size in MeshBudget(nodes).sizes:
            slots.append(
                np.array([u[1] // size if u[0] == group and u[1] >= size else 0 for u in units])
            )
            most.append(nodes.nodes * (nodes.devices // size))
    answer = milp(
        -np.array(values),
        integrality=np.ones(len(units)),
        bounds=Bounds(0, 2),
        constraints=[
            LinearConstraint(placed, 1, 1),
            LinearConstraint(np.stack(slots), -np.inf, np.array(most)),
        ],
        options={"mip_rel_gap": 1e-9},
    )
    if answer.x is None:
        return None
    counts = np.rint(answer.x).astype(int)
    return [unit for unit, count in zip(units, counts, strict=True) for _ in range(count)]
