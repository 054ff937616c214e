"""Whether a unit works. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UnitHealth:
    """One unit, as seen from outside its loop, which may hang.

    Attributes:
      unit: its name.
      models: the models on it.
      alive: whether its loop runs.
      stalled_seconds: how long it has had work and made no step; 0 when idle.
      reason: what its loop ended with, for one that has ended.
      restarts: how often it was started anew.
      restarting: whether that is being done now.
    """

    unit: str
    models: tuple[str, ...]
    alive: bool
    stalled_seconds: float
    reason: str | None
    restarts: int
    restarting: bool = False

    def works(self, stall_timeout: float) -> bool:
        """Whether requests are served: the loop runs, and makes steps when there is work."""
        return self.alive and self.stalled_seconds < stall_timeout
