"""Whether units work, and what state models are in. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ModelStatus = Literal["loaded", "loading", "sleeping", "failed"]


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


@dataclass(frozen=True)
class ModelHealth:
    """What there is to say of a model.

    Attributes:
      status: 'loading' also while it wakes.
      error: why it failed.
      pinned: whether it never sleeps.
    """

    status: ModelStatus
    error: str | None
    pinned: bool
