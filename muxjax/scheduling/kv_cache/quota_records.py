"""What the quotas remember of what moved, for `stats`: from whom, to whom, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

MoveReason = Literal["unused", "expected need"]
"""Why quota moved: the giver did not use it, or all are short and the giver has more than its
expected need and the taker less."""
ReclaimReason = Literal["floor", "quota", "first request", "growth"]
"""For what pages were taken back: a request within its model's floor or quota, the only request of
a model whose quota cannot hold it, or the next block of a running sequence."""


@dataclass(frozen=True, slots=True)
class QuotaMove:
    """A transfer of quota.

    Attributes:
      at: seconds.
      giver, taker: models.
      pages: how many.
      reason: see `MoveReason`.
      giver_use, taker_use: the part of its quota that each used at most since the last transfers.
    """

    at: float
    giver: str
    taker: str
    pages: int
    reason: MoveReason
    giver_use: float
    taker_use: float

    def as_dict(self) -> dict[str, Any]:
        """As stats show it."""
        return {
            "at": self.at,
            "from": self.giver,
            "to": self.taker,
            "pages": self.pages,
            "reason": self.reason,
            "from_use": self.giver_use,
            "to_use": self.taker_use,
        }


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Pages that one model lost to another because its requests were preempted.

    Attributes:
      at: seconds.
      giver, taker: models.
      pages: how many came free.
      requests: how many requests were preempted.
      reason: see `ReclaimReason`.
    """

    at: float
    giver: str
    taker: str
    pages: int
    requests: int
    reason: ReclaimReason

    def as_dict(self) -> dict[str, Any]:
        """As stats show it."""
        return {
            "at": self.at,
            "from": self.giver,
            "to": self.taker,
            "pages": self.pages,
            "requests": self.requests,
            "reason": self.reason,
        }
