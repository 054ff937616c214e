"""Exact placement of a small fleet: an integer program over all possible units.

Each candidate unit is a variable: a kind of node, a mesh size and a set of models. In very small
fleets a unit may also have half of a model, which is a replica. Constraints: each model is placed
once, and the meshes fit on the nodes. SciPy solves the program with HiGHS (Huangfu and Hall, Math.
Prog. Comp. 2018). The number of units grows as `2^models`; `search.py` places larger fleets.
"""

from __future__ import annotations

import itertools

import numpy as np

from muxjax.placement.planner.placements import MeshBudget
from muxjax.placement.planner.scorer import CandidateUnit, Items, Scorer

MAX_UNITS = 1000
"""Maximum number of candidate units."""
_MAX_UNITS_WITH_HALVES = 250
_MAX_MODELS = 16


def solve(scorer: Scorer) -> list[CandidateUnit] | None:
    """Finds the optimal units; None for a fleet that is too large or cannot be placed."""
    models = len(scorer.loads)
    sizes = sum(len(group.mesh_sizes()) for group in scorer.cluster.groups)
    if models > _MAX_MODELS or 2**models * sizes > MAX_UNITS:
        return None
    halves = scorer.cluster.num_devices > 1 and 3**models * sizes <= _MAX_UNITS_WITH_HALVES
    parts = (0.0, 0.5, 1.0) if halves else (0.0, 1.0)
    units: list[CandidateUnit] = []
    for chosen in itertools.product(parts, repeat=models):
        items: Items = tuple((model, part) for model, part in enumerate(chosen) if part)
        for group, nodes in enumerate(scorer.cluster.groups):
            units += [
                CandidateUnit(group, size, items)
                for size in nodes.mesh_sizes()
                if items and scorer.score(group, size, items) is not None
            ]
    return _solve_integer_program(scorer, units) if units else None


def _solve_integer_program(
    scorer: Scorer, units: list[CandidateUnit]
) -> list[CandidateUnit] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    values = []
    placed = np.zeros((len(scorer.loads), len(units)))
    slots: list[np.ndarray] = []
    capacities: list[float] = []
    for column, unit in enumerate(units):
        values.append(scorer.feasible_score(unit).value)
        for model, part in unit.items:
            placed[model, column] = part
    for group, nodes in enumerate(scorer.cluster.groups):
        for size in MeshBudget(nodes).sizes:
            slots.append(
                np.array(
                    [u.size // size if u.group == group and u.size >= size else 0 for u in units]
                )
            )
            capacities.append(nodes.nodes * (nodes.devices // size))
    solution = milp(
        -np.array(values),
        integrality=np.ones(len(units)),
        bounds=Bounds(0, 2),
        constraints=[
            LinearConstraint(placed, 1, 1),
            LinearConstraint(np.stack(slots), -np.inf, np.array(capacities)),
        ],
        options={"mip_rel_gap": 1e-9},
    )
    if solution.x is None:
        return None
    counts = np.rint(solution.x).astype(int)
    return [unit for unit, count in zip(units, counts, strict=True) for _ in range(count)]
