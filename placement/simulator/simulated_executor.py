"""An executor on a simulated clock. A cost model gives step durations; tokens are dummies.

`time_sliced`: one program runs at a time, in the order of submission. `concurrent`: programs run
concurrently, each on its share of the compute, like MuxServe's processes. If their total demand for
compute or memory bandwidth exceeds the device's, all slow down by the same factor. The bandwidth
matters because a program with a small compute share may use most of it.

Every request runs to its full length: no token is a stop token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter

from muxjax.placement.costs.cost_model import CostModel
from muxjax.placement.costs.step_times import StepTimes
from muxjax.placement.planner.plan import Execution
from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.scheduling.fair_share import StepKey
from muxjax.scheduling.steps import Decode, DecodeBatch, Prefill, Step, StepResult

TOKEN = 0
"""The value of every generated token."""

_MAX_STEP_TOKENS = 64
_TOKENS = [[TOKEN] * count for count in range(_MAX_STEP_TOKENS + 1)]
"""Token lists by length, shared by all steps because they are never modified."""


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """The properties of a model on a mesh that determine its step times.

    Attributes:
      kind: the model's name in the cost model.
      tp: devices that a replica is sharded over.
      replicas: replicas that share the batch.
      prefill_share, decode_share: fractions of the compute; 1 if time-sliced.
      max_seqs: number of device slots.
      times: measured times of the engine's steps, used instead of the cost model in time-sliced
        execution on one device; None: not measured.
    """

    kind: str
    tp: int = 1
    replicas: int = 1
    prefill_share: float = 1.0
    decode_share: float = 1.0
    max_seqs: int = 256
    times: StepTimes | None = None


@dataclass(slots=True, eq=False)
class SimulatedJob:
    """The handle of a submitted step.

    Attributes:
      step: the step.
      tokens: generated tokens of each sequence.
      started: simulated start time.
      seconds: duration without other programs.
      left: remaining part of `seconds` (concurrent execution).
      share: fraction of the compute.
      traffic: fraction of the mesh's memory bandwidth in use without other programs.
    """

    step: Step
    tokens: list[list[int]]
    started: float
    seconds: float
    left: float
    share: float
    traffic: float


class SimulatedExecutor:
    """Runs steps on a simulated clock.

    Attributes:
      now: simulated seconds; advanced by `result` and by the simulation loop.
      concurrent: whether steps run concurrently.
      busy_seconds: total duration of the finished steps.

    Args:
      models: models by name.
      costs: durations of steps.
      execution: time-sliced or concurrent execution.
      bandwidth: bytes per second of one device's memory, which concurrent programs share; None: no
        contention for bandwidth.
      compute: compute shares of concurrent programs; None: the shares of their models.
    """

    def __init__(
        self,
        models: Mapping[str, SimulatedModel],
        costs: CostModel,
        execution: Execution,
        *,
        bandwidth: float | None = None,
        compute: ComputeShares | None = None,
    ) -> None:
        self._compute = compute
        self._models = dict(models)
        self._costs = costs
        self.concurrent = execution == "concurrent"
        self._bandwidth = bandwidth
        self._contexts = {name: [0] * model.max_seqs for name, model in models.items()}
        self._jobs: list[SimulatedJob] = []
        self._slowdown = 1.0
        self._updated = 0.0  # time at which `left` of all jobs was last updated
        self.now = 0.0
        self.busy_seconds = 0.0

    def submit(self, step: Step) -> SimulatedJob:
        """Queues a step. It starts at once if concurrent, else after all earlier steps."""
        if isinstance(step, Prefill):
            job = self._prefill_job(step)
        else:
            job = self._decode_job(step)
        if self.concurrent:
            self._advance_jobs(self.now)
            job.started = self.now
            self._jobs.append(job)
            self._update_slowdown()
        else:
            if self._jobs:
                last = self._jobs[-1]
                job.started = max(self.now, last.started + last.seconds)
            else:
                job.started = self.now
            self._jobs.append(job)
        return job

    def next_end(self) -> tuple[float, SimulatedJob] | None:
        """Time and handle of the next step to end; None if none is in flight."""
        if not self._jobs:
            return None
        if not self.concurrent:
            job = self._jobs[0]
            return job.started + job.seconds, job
        job = min(self._jobs, key=attrgetter("left"))
        return max(self.now, self._updated + job.left * self._slowdown), job

    def result(self, handle: SimulatedJob) -> StepResult:
        """Returns the result of the next step to end, and advances the clock to its end.

        Raises:
          ValueError: another step ends first.
        """
        following = self.next_end()
        if following is None or following[1] is not handle:
            raise ValueError("results must be requested in the order in which the steps end")
        end = following[0]
        self.now = max(self.now, end)
        if self.concurrent:
            self._advance_jobs(self.now)
            self._jobs.remove(handle)
            self._update_slowdown()
        else:
            del self._jobs[0]
        seconds = end - handle.started
        self.busy_seconds += seconds
        return StepResult(handle.tokens, [None] * len(handle.tokens), handle.started, seconds)

    def add_model(self, name: str, model: SimulatedModel) -> None:
        """See `Executor.add_model`."""
        self._models[name] = model
        self._contexts[name] = [0] * model.max_seqs

    def remove_model(self, name: str) -> None:
        """See `Executor.remove_model`."""
        del self._models[name], self._contexts[name]

    def close(self) -> None:
        """Discards the steps in flight."""
        self._jobs.clear()

    # Durations

    def _prefill_job(self, step: Prefill) -> SimulatedJob:
        model = self._models[step.model]
        contexts = self._contexts[step.model]
        total = squares = 0
        tokens: list[list[int]] = []
        for chunk in step.chunks:
            count, end = len(chunk.tokens), chunk.end
            total += count
            # Each token attends to all previous tokens: `count x (start + end) / 2` pairs.
            squares += count * (chunk.start + end)
            if chunk.sampling is None:
                tokens.append(_TOKENS[0])
            else:
                contexts[chunk.slot] = end
                tokens.append(_TOKENS[1])
        if model.times is not None:
            chunks = [(len(c.tokens), c.end, c.sampling is not None) for c in step.chunks]
            return self._build_job(step, tokens, model.times.prefill_seconds(chunks), 1.0, 0.0)
        length = squares / total
        replica_tokens = total / model.replicas
        costs, tp = self._costs, model.tp
        share = self._share((step.model, "prefill"), model.prefill_share)
        seconds = costs.prefill_seconds(model.kind, replica_tokens, length, tp=tp, share=share)
        moved = costs.weight_bytes(model.kind, tp=tp)
        moved += replica_tokens * costs.kv_bytes_per_token(model.kind, tp=tp)
        return self._build_job(step, tokens, seconds, share, moved)

    def _decode_job(self, step: Decode) -> SimulatedJob:
        model = self._models[step.model]
        contexts = self._contexts[step.model]
        context = generated = longest = 0
        tokens: list[list[int]] = []
        for slot, count in _slots_and_counts(step):
            before = contexts[slot]
            context += before * count + count * (count + 1) // 2
            generated += count
            contexts[slot] = before + count
            longest = max(longest, before + count)
            tokens.append(_TOKENS[count])
        rounds = step.num_tokens
        if model.times is not None:
            mean_longest = longest - rounds / 2
            seconds = model.times.decode_seconds(len(step.sequences), rounds, mean_longest)
            return self._build_job(step, tokens, seconds, 1.0, 0.0)
        # The mean number of unfinished sequences over the rounds.
        batch = max(1.0, generated / rounds / model.replicas)
        costs, tp = self._costs, model.tp
        share = self._share((step.model, "decode"), model.decode_share)
        mean_context = context / generated
        round_seconds = costs.decode_seconds(model.kind, batch, mean_context, tp=tp, share=share)
        moved = costs.weight_bytes(model.kind, tp=tp) * rounds
        moved += context / model.replicas * costs.kv_bytes_per_token(model.kind, tp=tp)
        return self._build_job(step, tokens, rounds * round_seconds, share, moved)

    def _share(self, key: StepKey, default: float) -> float:
        return default if self._compute is None else self._compute.allocated(key)

    def _build_job(
        self, step: Step, tokens: list[list[int]], seconds: float, share: float, moved: float
    ) -> SimulatedJob:
        traffic = moved / seconds / self._bandwidth if self._bandwidth else 0.0
        return SimulatedJob(step, tokens, self.now, seconds, seconds, share, min(1.0, traffic))

    # Concurrent execution

    def _advance_jobs(self, now: float) -> None:
        done = (now - self._updated) / self._slowdown
        self._updated = now
        if done > 0:
            for job in self._jobs:
                job.left -= done

    def _update_slowdown(self) -> None:
        share = traffic = 0.0
        for job in self._jobs:
            share += job.share
            traffic += job.traffic
        self._slowdown = max(1.0, share, traffic)


def _slots_and_counts(step: Decode) -> Iterable[tuple[int, int]]:
    """Slot and number of generated tokens of each sequence."""
    sequences = step.sequences
    if isinstance(sequences, DecodeBatch):  # Arrays avoid an object for each sequence.
        return zip(sequences.slots.tolist(), sequences.num_tokens.tolist(), strict=True)
    return [(sequence.slot, sequence.num_tokens) for sequence in sequences]
