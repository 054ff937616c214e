"""Steps in flight: built, results not yet applied."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from muxjax.scheduling.fair_share import StepKey
from muxjax.scheduling.requests import Request
from muxjax.scheduling.steps import Step


@dataclass(slots=True)
class InFlightStep:
    """A step in flight.

    Attributes:
      number: sequence number of the step, counted from 1.
      step: the step.
      key: model and phase that its time is charged to.
      seconds: expected device time that was charged for it.
      requests: the requests in it, in the step's order.
    """

    number: int
    step: Step
    key: StepKey
    seconds: float
    requests: list[Request]


class InFlightSteps:
    """The steps in flight of one scheduler, oldest first.

    Args:
      concurrent: steps may end in any order.

    Attributes:
      concurrent: as given.
      started: number of steps started so far, those that have ended included.
    """

    def __init__(self, *, concurrent: bool) -> None:
        self.concurrent = concurrent
        self.started = 0
        self._steps: deque[InFlightStep] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def begin(self, step: Step, key: StepKey, seconds: float, requests: list[Request]) -> None:
        """Adds a step."""
        self.started += 1
        self._steps.append(InFlightStep(self.started, step, key, seconds, requests))

    def end(self, step: Step) -> InFlightStep:
        """Removes a step: the oldest one, or any if steps are concurrent.

        Raises:
          ValueError: another step has to end first, or the step is not in flight.
        """
        for index, entry in enumerate(self._steps):
            if entry.step is step:
                del self._steps[index]
                return entry
            if not self.concurrent:
                break
        raise ValueError("steps must be applied in the order in which they were built")

    def step_keys(self) -> list[StepKey]:
        """Model and phase of each step, oldest first."""
        return [entry.key for entry in self._steps]

    def is_settled(self, request: Request) -> bool:
        """Whether no step in flight contains the request."""
        last = request.last_step
        return all(entry.number != last for entry in self._steps)

    def busy_slots(self, last_step: np.ndarray) -> np.ndarray:
        """Mask of the slots whose sequence is in a step in flight.

        Args:
          last_step: int64 `[S]`, number of the last step of each slot's sequence.

        Returns:
          bool `[S]`.
        """
        busy = np.zeros(len(last_step), bool)
        for entry in self._steps:  # few entries, so this is faster than `np.isin`
            busy |= last_step == entry.number
        return busy
