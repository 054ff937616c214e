"""The outcome of each request of a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["finished", "rejected", "failed"]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """The outcome of one request. All times are seconds since the start of the workload.

    Attributes:
      id: position in the workload.
      model: the requested model.
      unit: the unit that ran the request; empty if the request was rejected.
      status: finished; rejected at arrival; or failed, which means admitted but not finished.
      reason: why the request did not finish; empty if it finished.
      arrival: time of arrival.
      prompt_tokens, output_tokens: requested lengths.
      made_tokens: generated output tokens; fewer than requested if the model's length limit ended
        the request.
      first_token, end: time of the first and of the last token; None without tokens.
      preemptions: number of preemptions.
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
        """Seconds per token after the first; None for fewer than two tokens."""
        if self.end is None or self.first_token is None or self.made_tokens < 2:
            return None
        return (self.end - self.first_token) / (self.made_tokens - 1)

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the last token."""
        return None if self.end is None else self.end - self.arrival
