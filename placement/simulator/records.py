"""What became of each request of a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["finished", "rejected", "failed"]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request.

    Attributes:
      id: its place in the workload.
      model: who was asked.
      unit: where it ran; empty if it was rejected.
      status: finished; rejected at arrival; or failed, admitted and not finished.
      reason: why not, in words.
      arrival: seconds since the workload's start; so are all times.
      prompt_tokens, output_tokens: what was asked for.
      made_tokens: output tokens that were made; fewer than asked for where the model's length
        limit ended it.
      first_token, end: when the first and the last token came; None if they did not.
      preemptions: how often it lost its pages.
    """

    id: int
    model: str
    unit: str
    status: Status
    arrival: float
    prompt_tokens: int
    output_tokens: int
    made_tokens: int = 0
    first_token: float | None = None
    end: float | None = None
    preemptions: int = 0
    reason: str = ""

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None where there is no second one."""
        if self.end is None or self.first_token is None or self.made_tokens < 2:
            return None
        return (self.end - self.first_token) / (self.made_tokens - 1)

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the last token."""
        return None if self.end is None else self.end - self.arrival
