"""Health of units and state of models. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ModelStatus = Literal["loaded", "loading", "sleeping", "failed"]


@dataclass(frozen=True)
class UnitHealth:
    """The health of one unit, read without calling its engine, which may hang.

    Attributes:
      unit: name of the unit.
      models: names of the models on it.
      alive: whether its engine runs.
      stalled_seconds: seconds since its last step while it has work; 0 when idle.
      reason: the error that its engine has ended with, or None.
      restarts: number of restarts so far.
      restarting: whether it is being restarted.
    """

    unit: str
    models: tuple[str, ...]
    alive: bool
    stalled_seconds: float
    reason: str | None
    restarts: int
    restarting: bool = False

    def works(self, stall_timeout: float) -> bool:
        """Whether requests are served: the engine runs, and is not stalled."""
        return self.alive and self.stalled_seconds < stall_timeout


@dataclass(frozen=True)
class ModelHealth:
    """The state of one model.

    Attributes:
      status: 'loading' also while the model wakes.
      error: reason of the failure, or None.
      pinned: whether it is never put to sleep.
    """

    status: ModelStatus
    error: str | None
    pinned: bool
