"""Runs workloads through the production scheduler on a simulated clock.

Each unit has the real `Scheduler`, with its policy, allocator and quotas, and a
`SimulatedExecutor`; the loop around them is the engine's. Units run at the same time and meet only
in the router: a request goes to the unit that holds its model, if several do to the one that the
engine's router would take (`scheduling/routing.py`). Units are therefore moved on one by one, each
up to the moment of the request that it gets next.

Nothing is drawn at random here, so a workload's seed decides everything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from muxjax.errors import InvalidRequest, MuxError, WorkloadError
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_executor import SimulatedExecutor, SimulatedJob
from muxjax.placement.workload.trace import TraceRequest
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.requests import Request
from muxjax.scheduling.routing import least_loaded
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import STEPS_AHEAD, Prefill, Step, StepResult

STUCK_SECONDS = 0.05
"""How long the loop waits where requests exist and no step can be made: time moves quotas."""
_MOST_STUCK = 10_000

OnRecord = Callable[[RequestRecord], None]
Observer = Callable[[Scheduler, Step, StepResult], None]
"""Is shown each step that has been applied, as by the engine."""


class SimulationStuck(MuxError):
    """Requests wait, nothing runs, and no step can be made: a fault of the scheduler."""


class UnitSimulation:
    """One unit on the simulated clock.

    Args:
      name: of the unit.
      unit: its scheduler.
      executor: its device.
      seconds: of each model: for each token of a request, from first to last, as planned.

    Attributes:
      observer: is shown each step.
    """

    def __init__(
        self,
        name: str,
        unit: Scheduler,
        executor: SimulatedExecutor,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self.name = name
        self.unit = unit
        self.executor = executor
        self._concurrent = executor.concurrent
        self._in_flight: deque[SimulatedJob] = deque()
        self._stuck = 0
        self.steps = {"prefill": 0, "decode": 0}
        self._seconds = dict(seconds or {})
        self.observer: Observer | None = None

    def seconds(self, model: str, num_tokens: int) -> float:
        """How long a request of so many tokens, output included, is expected to take."""
        return self._seconds.get(model, 1.0) * num_tokens

    def add(self, request: Request) -> None:
        """Queues a request at its arrival, up to which the unit must have been moved on.

        Raises:
          InvalidRequest: the unit does not take it.
        """
        self.unit.add(request)
        if self._concurrent or not self._in_flight:
            self._fill()

    def advance(self, until: float, ended: Callable[[UnitSimulation, Request], None]) -> None:
        """Moves the clock on to a time, and runs what ends before.

        Raises:
          SimulationStuck: requests wait and no step can be made for a long time.
        """
        executor = self.executor
        while True:
            found = executor.next_end()
            if found is None:
                if not self.unit.num_requests:
                    break
                # Only time can help: quotas move.
                wake = executor.now + STUCK_SECONDS
                if wake > until:
                    break
                self._stuck += 1
                if self._stuck > _MOST_STUCK:
                    raise SimulationStuck(self._describe())
                executor.now = wake
                self._fill()
                continue
            end, job = found
            if end > until:
                break
            self._stuck = 0
            result = executor.result(job)
            self._in_flight.remove(job)
            for update in self.unit.apply(job.step, result, executor.now):
                if update.finish_reason is not None:
                    ended(self, update.request)
            if self.observer is not None:
                self.observer(self.unit, job.step, result)
            self._fill()
        if until > executor.now and until != float("inf"):
            executor.now = until

    def _fill(self) -> None:
        """Submits steps as long as the loop of the engine would."""
        while self._concurrent or len(self._in_flight) < STEPS_AHEAD:
            step: Step | None = self.unit.next_step(self.executor.now)
            if step is None:
                return
            self.steps["prefill" if isinstance(step, Prefill) else "decode"] += 1
            self._in_flight.append(self.executor.submit(step))

    def _describe(self) -> str:
        waiting = {name: len(state.waiting) for name, state in self.unit.models.items()}
        now = self.executor.now
        return f"unit {self.name}: no step can be made at {now:.3f} s; waiting: {waiting}"


@lru_cache(maxsize=8192)
def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


class Simulation:
    """A workload on some units.

    Args:
      units: who serves what; a model may be on several.
      max_waiting: requests of a model that may be unfinished on a unit; more are rejected. None:
        any number.
    """

    def __init__(self, units: Sequence[UnitSimulation], *, max_waiting: int | None = None) -> None:
        self.units = list(units)
        self._max_waiting = max_waiting
        self._holders: dict[str, list[UnitSimulation]] = {}
        for unit in self.units:
            for name in unit.unit.models:
                self._holders.setdefault(name, []).append(unit)

    def run(self, workload: Iterable[TraceRequest], on_record: OnRecord) -> float:
        """Runs a workload to its end.

        Args:
          workload: requests in order of arrival; taken one at a time.
          on_record: gets the record of each request when it has ended, unit by unit, so not in
            order of time.

        Returns:
          The simulated seconds until the last request ended.

        Raises:
          WorkloadError: a model that no unit has.
        """
        outputs: dict[int, int] = {}
        waits = dict.fromkeys([unit.name for unit in self.units], 0.0)

        def ended(unit: UnitSimulation, request: Request) -> None:
            asked = outputs.pop(request.id)
            waits[unit.name] -= unit.seconds(request.model, len(request.prompt) + asked)
            on_record(_record(unit.name, request, asked))

        for number, asked in enumerate(workload):
            holders = self._holders.get(asked.model)
            if holders is None:
                raise WorkloadError(
                    f"request {number} asks for {asked.model}, which no unit has; there are "
                    f"{', '.join(self._holders)}"
                )
            for unit in holders:
                unit.advance(asked.arrival, ended)
            tokens = asked.prompt_tokens + asked.output_tokens
            unit = least_loaded(holders, waits, asked.model, tokens)
            request = Request(
                number,
                asked.model,
                _prompt(asked.prompt_tokens),
                _params(asked.output_tokens),
                arrival=asked.arrival,
            )
            reason = self._refusal(unit, asked.model)
            if reason is None:
                outputs[number] = asked.output_tokens
                try:
                    unit.add(request)
                except InvalidRequest as error:
                    del outputs[number]
                    reason = str(error)
                else:
                    waits[unit.name] += unit.seconds(asked.model, tokens)
            if reason is not None:
                on_record(_rejected(number, asked, reason))
        for unit in self.units:
            unit.advance(float("inf"), ended)
        return max(unit.executor.now for unit in self.units)

    def _refusal(self, unit: UnitSimulation, model: str) -> str | None:
        if self._max_waiting is None:
            return None
        waiting = len(unit.unit.models[model].waiting)
        if waiting < self._max_waiting:
            return None
        return f"{waiting} requests wait already"


def _prompt(tokens: int) -> Sequence[int]:
    return bytes(tokens)


def _record(unit: str, request: Request, asked: int) -> RequestRecord:
    return RequestRecord(
        request.id,
        request.model,
        unit,
        "finished",
        request.arrival,
        len(request.prompt),
        asked,
        len(request.output),
        request.first_token_at,
        request.finished_at,
        request.preemptions,
    )


def _rejected(number: int, asked: TraceRequest, reason: str) -> RequestRecord:
    return RequestRecord(
        number,
        asked.model,
        "",
        "rejected",
        asked.arrival,
        asked.prompt_tokens,
        asked.output_tokens,
        reason=reason,
    )
