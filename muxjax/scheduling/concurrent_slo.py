"""`slo` where programs run side by side. See `pacing.py` for what latency targets ask for."""

from __future__ import annotations

from muxjax.scheduling.compute_shares import ComputeShares
from muxjax.scheduling.concurrent_policies import ConcurrentAdaptiveBatch
from muxjax.scheduling.pacing import Pace, decodes_in_order
from muxjax.scheduling.steps import Prefill, Step
from muxjax.scheduling.unit import Unit


class ConcurrentSlo(ConcurrentAdaptiveBatch):
    """`slo`: Algorithm 3, but prompts wait for each other, and models go as their targets ask.

    A prefill takes the chip from the decodes that run, one after the other or not, which is why
    prompts wait for each other here too.
    """

    name = "slo"

    def __init__(self, compute: ComputeShares) -> None:
        super().__init__(compute)
        self._paces: dict[str, Pace] = {}
        self._membership = -1  # `unit.membership` that they were made for

    def next_step(self, unit: Unit, now: float) -> Step | None:
        if self._membership != unit.membership:
            self._membership = unit.membership
            self._paces = {name: Pace(s, unit.estimates) for name, s in unit.models.items()}
        return super().next_step(unit, now)

    def prefills(self, unit: Unit, now: float) -> list[str]:
        """Models whose prompts are due, the most urgent first."""
        running = sum([len(state.running) for state in unit.models.values()])
        due: list[tuple[tuple[int, float], str]] = []
        for model, state in unit.models.items():
            if state.has_prefill:
                pace = self._paces[model]
                pace.sort_line(unit, now)
                if not running or pace.patience(running, now) <= 0:
                    due.append((pace.place(unit.time.virtual((model, "prefill")), now), model))
        return [model for _, model in sorted(due)]

    def decodes(self, unit: Unit, now: float) -> list[str]:
        """Models with sequences to decode, whose tokens are due first before the others."""
        return decodes_in_order(self._paces, unit)[0]

    def made(self, step: Step, now: float) -> None:
        """Notes what targets count with."""
        if not isinstance(step, Prefill):
            self._paces[step.model].began_decode(step.num_tokens, now)
