"""Records of moved quota and reclaimed pages, for the statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

MoveReason = Literal["unused", "expected need"]
"""Why quota moved. `unused`: the donor did not use it. `expected need`: all models use their quota;
the donor was above its initial quota and the recipient below."""
ReclaimReason = Literal["floor", "quota", "first request", "growth"]
"""Purpose of the reclaimed pages. `floor`, `quota`: a request within its model's floor or quota.
`first request`: the only request of a model, larger than the quota. `growth`: the next block of
a running sequence."""


@dataclass(frozen=True, slots=True)
class QuotaMove:
    """A transfer of quota between two models.

    Attributes:
      at: time, in seconds.
      donor, recipient: models.
      pages: pages of quota that moved.
      reason: see `MoveReason`.
      donor_use, recipient_use: largest fraction of its quota that each model leased since the
        moves before.
    """

    at: float
    donor: str
    recipient: str
    pages: int
    reason: MoveReason
    donor_use: float
    recipient_use: float

    def as_dict(self) -> dict[str, Any]:
        """Returns the JSON form that the statistics show."""
        return {
            "at": self.at,
            "from": self.donor,
            "to": self.recipient,
            "pages": self.pages,
            "reason": self.reason,
            "from_use": self.donor_use,
            "to_use": self.recipient_use,
        }


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Pages that one model lost to another by preemption.

    Attributes:
      at: time, in seconds.
      donor, recipient: models.
      pages: pages that became free.
      requests: number of preempted requests.
      reason: see `ReclaimReason`.
    """

    at: float
    donor: str
    recipient: str
    pages: int
    requests: int
    reason: ReclaimReason

    def as_dict(self) -> dict[str, Any]:
        """Returns the JSON form that the statistics show."""
        return {
            "at": self.at,
            "from": self.donor,
            "to": self.recipient,
            "pages": self.pages,
            "requests": self.requests,
            "reason": self.reason,
        }
