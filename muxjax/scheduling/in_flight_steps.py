"""Steps that were made and whose results have not been taken in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from muxjax.scheduling.fair_share import StepKey
from muxjax.scheduling.requests import Request
from muxjax.scheduling.steps import Step


@dataclass(slots=True)
class InFlightStep:
    """One such step.

    Attributes:
      number: of the step, counted from 1.
      step: the step.
      turn: whose time it takes.
      seconds: what was charged for it.
      requests: who is in it, in its order.
    """

    number: int
    step: Step
    turn: StepKey
    seconds: float
    requests: list[Request]


class InFlightSteps:
    """Those of one unit.

    Args:
      concurrent: steps may end in any order.

    Attributes:
      concurrent: as given.
      made: how many steps have been made, ended ones included.
    """

    def __init__(self, *, concurrent: bool) -> None:
        self.concurrent = concurrent
        self.made = 0
        self._flights: deque[InFlightStep] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def begin(self, step: Step, turn: StepKey, seconds: float, requests: list[Request]) -> None:
        """Counts a step as made."""
        self.made += 1
        self._flights.append(InFlightStep(self.made, step, turn, seconds, requests))

    def end(self, step: Step) -> InFlightStep:
        """Takes out the oldest step; any if they run side by side.

        Raises:
          ValueError: a step out of order.
        """
        for index, flight in enumerate(self._flights):
            if flight.step is step:
                del self._flights[index]
                return flight
            if not self.concurrent:
                break
        raise ValueError("steps must be applied in the order in which they were made")

    def turns(self) -> list[StepKey]:
        """The model and phase of each, in the order of making."""
        return [flight.turn for flight in self._flights]

    def settled(self, request: Request) -> bool:
        """Whether none works on the request."""
        last = request.last_step
        return all(flight.number != last for flight in self._flights)

    def work_on(self, last_step: np.ndarray) -> np.ndarray:
        """Which slots one works on.

        Args:
          last_step: `[S]`, the number of the last step of each slot's sequence.
        """
        busy = np.zeros(len(last_step), bool)
        for flight in self._flights:  # few, so that this is a third of `np.isin`
            busy |= last_step == flight.number
        return busy
