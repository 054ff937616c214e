"""Runs workloads through the production scheduler on a simulated clock.

Each unit combines the real `Scheduler`, with its policy, allocator and quotas, with a
`SimulatedExecutor`. Steps are submitted and applied as in the engine's loop. If a model is on
several units, requests are routed by the rule of the engine's router (`scheduling/routing.py`).
Units interact only through routing. The clock of each unit is therefore advanced independently, up
to the arrival of its next request.

The simulator is deterministic: the workload and its seed determine the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from muxjax.errors import InvalidRequest, MuxError, WorkloadError
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_executor import SimulatedExecutor, SimulatedJob
from muxjax.placement.workload.trace import TraceRequest
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.requests import Request
from muxjax.scheduling.routing import PlannedLoad, fastest_unit
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import STEPS_AHEAD, Prefill, Step, StepResult

STALL_SECONDS = 0.05
"""Seconds until the next attempt if no step can be scheduled: quotas change over time."""
_MAX_STALLS = 10_000

OnRecord = Callable[[RequestRecord], None]
Observer = Callable[[Scheduler, Step, StepResult], None]
"""Called with each applied step, as in the engine."""


class SimulationStalled(MuxError):
    """Requests wait, but no step is in flight or can be scheduled: a bug of the scheduler."""


class UnitSimulation:
    """One unit on a simulated clock.

    Args:
      name: name of the unit.
      scheduler: scheduler of the unit.
      executor: executes the steps on the simulated clock.
      planned_load: what the plan expects of the unit; None: nothing.

    Attributes:
      steps: number of submitted steps by phase.
      observer: called with each applied step.
    """

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        executor: SimulatedExecutor,
        planned_load: PlannedLoad | None = None,
    ) -> None:
        self.name = name
        self.scheduler = scheduler
        self.executor = executor
        self._concurrent = executor.concurrent
        self._in_flight: deque[SimulatedJob] = deque()
        self._stalls = 0
        self.steps = {"prefill": 0, "decode": 0}
        self.planned_load = planned_load or PlannedLoad()
        self.observer: Observer | None = None

    def add(self, request: Request) -> None:
        """Queues a request. The clock must have been advanced to its arrival.

        Raises:
          InvalidRequest: the scheduler refuses the request.
        """
        self.scheduler.add(request)
        if self._concurrent or not self._in_flight:
            self._submit_steps()

    def advance(self, until: float, on_finish: Callable[[UnitSimulation, Request], None]) -> None:
        """Advances the clock and applies all steps that end by then.

        Args:
          until: simulated seconds.
          on_finish: called with each finished request.

        Raises:
          SimulationStalled: requests wait, but no step can be scheduled for a long time.
        """
        executor = self.executor
        while True:
            following = executor.next_end()
            if following is None:
                if not self.scheduler.num_requests:
                    break
                # Only time can unblock the requests: quotas adapt over time.
                wake = executor.now + STALL_SECONDS
                if wake > until:
                    break
                self._stalls += 1
                if self._stalls > _MAX_STALLS:
                    raise SimulationStalled(self._describe_stall())
                executor.now = wake
                self._submit_steps()
                continue
            end, job = following
            if end > until:
                break
            self._stalls = 0
            result = executor.result(job)
            self._in_flight.remove(job)
            for update in self.scheduler.apply(job.step, result, executor.now):
                if update.finish_reason is not None:
                    on_finish(self, update.request)
            if self.observer is not None:
                self.observer(self.scheduler, job.step, result)
            self._submit_steps()
        if until > executor.now and until != float("inf"):
            executor.now = until

    def _submit_steps(self) -> None:
        """Submits steps as in the engine's loop: up to `STEPS_AHEAD`, or all if concurrent."""
        while self._concurrent or len(self._in_flight) < STEPS_AHEAD:
            step: Step | None = self.scheduler.next_step(self.executor.now)
            if step is None:
                return
            self.steps["prefill" if isinstance(step, Prefill) else "decode"] += 1
            self._in_flight.append(self.executor.submit(step))

    def _describe_stall(self) -> str:
        waiting = {name: len(state.waiting) for name, state in self.scheduler.models.items()}
        now = self.executor.now
        return (
            f"unit {self.name}: no step can be scheduled at {now:.3f} s; waiting requests by "
            f"model: {waiting}"
        )


@lru_cache(maxsize=8192)
def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


class Simulation:
    """A simulation of several units.

    Args:
      units: the units; a model may be on several.
      max_waiting: maximum number of waiting requests of a model on a unit; further requests are
        rejected. None: no limit.
    """

    def __init__(self, units: Sequence[UnitSimulation], *, max_waiting: int | None = None) -> None:
        self.units = list(units)
        self._max_waiting = max_waiting
        self._units_by_model: dict[str, list[UnitSimulation]] = {}
        for unit in self.units:
            for name in unit.scheduler.models:
                self._units_by_model.setdefault(name, []).append(unit)

    def run(self, workload: Iterable[TraceRequest], on_record: OnRecord) -> float:
        """Runs a workload to its end.

        Args:
          workload: requests in order of arrival, consumed one at a time.
          on_record: called with the record of each request at its end. Units are simulated
            independently, so records are not in order of time.

        Returns:
          The simulated seconds until the end of the last request.

        Raises:
          WorkloadError: a request for a model that is on no unit.
        """
        outputs: dict[int, int] = {}
        queued_seconds = dict.fromkeys([unit.name for unit in self.units], 0.0)

        def on_finish(unit: UnitSimulation, request: Request) -> None:
            output_tokens = outputs.pop(request.id)
            tokens = len(request.prompt) + output_tokens
            queued_seconds[unit.name] -= unit.planned_load.seconds(request.model, tokens)
            on_record(_finished_record(unit.name, request, output_tokens))

        for number, traced in enumerate(workload):
            units = self._units_by_model.get(traced.model)
            if units is None:
                raise WorkloadError(
                    f"request {number} is for {traced.model}, which is on no unit; the units have "
                    f"{', '.join(self._units_by_model)}"
                )
            for unit in units:
                unit.advance(traced.arrival, on_finish)
            tokens = traced.prompt_tokens + traced.output_tokens
            unit = fastest_unit(units, queued_seconds, traced.model, tokens)
            request = Request(
                number,
                traced.model,
                _prompt(traced.prompt_tokens),
                _params(traced.output_tokens),
                arrival=traced.arrival,
            )
            reason = self._rejection_reason(unit, traced.model)
            if reason is None:
                outputs[number] = traced.output_tokens
                try:
                    unit.add(request)
                except InvalidRequest as error:
                    del outputs[number]
                    reason = str(error)
                else:
                    queued_seconds[unit.name] += unit.planned_load.seconds(traced.model, tokens)
            if reason is not None:
                on_record(_rejected_record(number, traced, reason))
        for unit in self.units:
            unit.advance(float("inf"), on_finish)
        return max(unit.executor.now for unit in self.units)

    def _rejection_reason(self, unit: UnitSimulation, model: str) -> str | None:
        if self._max_waiting is None:
            return None
        waiting = len(unit.scheduler.models[model].waiting)
        if waiting < self._max_waiting:
            return None
        return f"{waiting} requests are waiting already"


def _prompt(tokens: int) -> Sequence[int]:
    return bytes(tokens)


def _finished_record(unit: str, request: Request, output_tokens: int) -> RequestRecord:
    return RequestRecord(
        request.id,
        request.model,
        unit,
        "finished",
        request.arrival,
        len(request.prompt),
        output_tokens,
        len(request.output),
        request.first_token_at,
        request.finished_at,
        request.preemptions,
    )


def _rejected_record(number: int, traced: TraceRequest, reason: str) -> RequestRecord:
    return RequestRecord(
        number,
        traced.model,
        "",
        "rejected",
        traced.arrival,
        traced.prompt_tokens,
        traced.output_tokens,
        reason=reason,
    )
