"""Who decodes first, where steps go by latency targets.

Whoever's tokens are due (`pacing.py`) is first. That goes by targets for each token, and by those
for whole requests where they are tight and can be kept by all (`strain.py`); else these say nothing
about the order: there shares of the time decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from muxjax.scheduling.fair_share import StepKey
from muxjax.scheduling.policies.slo_tracker import TOKENS_PART, SloTracker
from muxjax.scheduling.policies.slo_utilization import SloUtilization
from muxjax.scheduling.scheduler import Scheduler

OVERDRAFT = 2.0
"""Decodes that a model may be ahead of its share where turns make everybody late, in requests of
mean length that are alone. With fewer, those that are first are interrupted, and late as well: with
2 seconds, half of a 13B's request, 27 % were in time of a 7B and two 13B on four overloaded A100s,
and 56 % with two requests."""


def edf_order(
    paces: Mapping[str, SloTracker],
    unit: Scheduler,
    decodes: list[StepKey],
    now: float,
    strain: SloUtilization,
) -> tuple[list[str], float]:
    """Models with sequences to decode, who is first before the others.

    First those whose next tokens are due: with a target for each token, and where targets for whole
    requests are tight and there is time to keep all of them. Shares of the time would give a model
    of small batches and long steps less than it needs there, and one that has time enough more: a
    30B beside a 13B took 2.1 to 2.3 times what it takes alone, and 1.6 with tokens that are due.
    Where there is not time for all and prefills, everybody would be just late: of two 7B, a 13B and
    a 65B 59 % were in time so, and 90 % by shares.

    Then, where targets are so tight that turns would make everybody late, the model with the oldest
    sequence, so that some are in time, until it is `OVERDRAFT` ahead of its share; else whoever
    is furthest behind its share of the time: batches that are full are then decoded more often than
    small ones, which cost nearly as much, and nobody waits for long.

    Args:
      paces: of all models of the unit.
      unit: the unit.
      decodes: who has sequences to decode.
      now: seconds.
      strain: as it is now.

    Returns:
      The models, and when the next tokens are due of those that are not first for that.
    """
    due: list[tuple[float, str]] = []
    others: list[StepKey] = []
    next_due = math.inf
    turns = False
    whole = any(pace.tight for pace in paces.values()) and strain.leaves_room(TOKENS_PART)
    for turn in decodes:
        pace = paces[turn[0]]
        latest = pace.latest_decode(whole)
        if latest <= now:
            due.append((latest, turn[0]))
        else:
            next_due = min(next_due, latest)
            others.append(turn)
            turns = turns or not pace.tight
    time = unit.time
    others.sort(key=time.virtual)
    if not turns and not whole:

        def place(turn: StepKey) -> tuple[int, int]:
            pace = paces[turn[0]]
            if time.credit(turn) < -OVERDRAFT * pace.mean_output() * pace.isolated_tpot():
                return 1, 0
            return 0, next(iter(unit.models[turn[0]].running.values())).order

        others.sort(key=place)
    return [model for _, model in sorted(due)] + [model for model, _ in others], next_due
