"""An executor that takes as long as a cost model says, and makes no tokens worth reading.

`time_sliced`: one program at a time owns the mesh, in the order of submission. `concurrent`:
programs run side by side, each on its share of the compute, as MuxServe's processes do; when
together they want more compute than there is, or more memory bandwidth, all slow down alike. (In
MuxServe's profile a program that is alone on 30 % of the compute takes up to 70 % of the bandwidth,
so two such cannot run as if each were alone.)

Every request runs to its full length: nothing is a stop token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from muxjax.placement.costs.cost_model import CostModel
from muxjax.placement.costs.step_times import StepTimes
from muxjax.placement.planner.plan import Execution
from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.scheduling.fair_share import StepKey
from muxjax.scheduling.steps import Decode, DecodeBatch, Prefill, Step, StepResult

TOKEN = 0
"""Every token that is made."""

_LONGEST_BURST = 64
_TOKENS = [[TOKEN] * count for count in range(_LONGEST_BURST + 1)]


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """A model on a mesh, as its steps' times depend on it.

    Attributes:
      kind: what the cost model calls it.
      tp: devices that a copy is split over.
      replicas: copies that share the batch.
      prefill_share, decode_share: parts of the compute; 1 where time is sliced.
      max_seqs: device slots.
      times: of the engine's own steps, if they were measured; they are taken in place of the cost
        model's, where one program runs at a time on a whole device.
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
    """A step on the device; the handle of a submitted step.

    Attributes:
      step: the step.
      tokens: what it will have made.
      started: when the device began it.
      seconds: how long it takes alone.
      left: how much of that is still to do, while it runs beside others.
      share: its part of the compute.
      traffic: the part of the mesh's memory bandwidth that it takes alone.
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
      now: simulated seconds; moved on by `result` and by whoever drives the simulation.
      concurrent: whether steps run at the same time.

    Args:
      models: by name.
      costs: how long steps take.
      execution: one program at a time, or side by side.
      bandwidth: bytes a second of one device's memory, which programs side by side share; None:
        they do not get in each other's way there.
      compute: what programs side by side take of the compute; None: their models' shares.
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
        self._held = {name: [0] * model.max_seqs for name, model in models.items()}
        self._jobs: list[SimulatedJob] = []
        self._slowdown = 1.0
        self._then = 0.0  # when `left` was last brought up to date
        self.now = 0.0
        self.busy_seconds = 0.0

    def submit(self, step: Step) -> SimulatedJob:
        """Queues a step; it starts at once, or when those before it have ended."""
        if isinstance(step, Prefill):
            job = self._prefill(step)
        else:
            job = self._decode(step)
        if self.concurrent:
            self._bring_up_to(self.now)
            job.started = self.now
            self._jobs.append(job)
            self._contend()
        else:
            if self._jobs:
                last = self._jobs[-1]
                job.started = max(self.now, last.started + last.seconds)
            else:
                job.started = self.now
            self._jobs.append(job)
        return job

    def next_end(self) -> tuple[float, SimulatedJob] | None:
        """When the next step ends, and which; None if none is in flight."""
        if not self._jobs:
            return None
        if not self.concurrent:
            job = self._jobs[0]
            return job.started + job.seconds, job
        job = min(self._jobs, key=_left)
        return max(self.now, self._then + job.left * self._slowdown), job

    def result(self, handle: SimulatedJob) -> StepResult:
        """What the step gave; the clock moves to its end, which must be the next one."""
        found = self.next_end()
        if found is None or found[1] is not handle:
            raise ValueError("the results of steps are asked for in the order in which they end")
        end = found[0]
        self.now = max(self.now, end)
        if self.concurrent:
            self._bring_up_to(self.now)
            self._jobs.remove(handle)
            self._contend()
        else:
            del self._jobs[0]
        seconds = end - handle.started
        self.busy_seconds += seconds
        return StepResult(handle.tokens, [None] * len(handle.tokens), handle.started, seconds)

    def add_model(self, name: str, model: SimulatedModel) -> None:
        """See `Executor.add_model`."""
        self._models[name] = model
        self._held[name] = [0] * model.max_seqs

    def remove_model(self, name: str) -> None:
        """See `Executor.remove_model`."""
        del self._models[name], self._held[name]

    def close(self) -> None:
        """Forgets what is in flight."""
        self._jobs.clear()

    # Durations

    def _prefill(self, step: Prefill) -> SimulatedJob:
        model = self._models[step.model]
        held = self._held[step.model]
        total = squares = 0
        tokens: list[list[int]] = []
        for chunk in step.chunks:
            count, end = len(chunk.tokens), chunk.end
            total += count
            # A token attends to those before it: `count x (start + end) / 2` pairs.
            squares += count * (chunk.start + end)
            if chunk.sampling is None:
                tokens.append(_TOKENS[0])
            else:
                held[chunk.slot] = end
                tokens.append(_TOKENS[1])
        if model.times is not None:
            chunks = [(len(c.tokens), c.end, c.sampling is not None) for c in step.chunks]
            return self._job(step, tokens, model.times.prefill_seconds(chunks), 1.0, 0.0)
        length = squares / total
        each = total / model.replicas
        costs, tp = self._costs, model.tp
        share = self._share((step.model, "prefill"), model.prefill_share)
        seconds = costs.prefill_seconds(model.kind, each, length, tp=tp, share=share)
        moved = costs.weight_bytes(model.kind, tp=tp)
        moved += each * costs.kv_bytes_per_token(model.kind, tp=tp)
        return self._job(step, tokens, seconds, share, moved)

    def _decode(self, step: Decode) -> SimulatedJob:
        model = self._models[step.model]
        held = self._held[step.model]
        context = made = longest = 0
        tokens: list[list[int]] = []
        for slot, count in _slots_and_counts(step):
            before = held[slot]
            context += before * count + count * (count + 1) // 2
            made += count
            held[slot] = before + count
            longest = max(longest, before + count)
            tokens.append(_TOKENS[count])
        rounds = step.num_tokens
        if model.times is not None:
            halfway = longest - rounds / 2
            alone = model.times.decode_seconds(len(step.sequences), rounds, halfway)
            return self._job(step, tokens, alone, 1.0, 0.0)
        # Sequences that are still alive, on average over the rounds.
        batch = max(1.0, made / rounds / model.replicas)
        costs, tp = self._costs, model.tp
        share = self._share((step.model, "decode"), model.decode_share)
        each = costs.decode_seconds(model.kind, batch, context / made, tp=tp, share=share)
        moved = costs.weight_bytes(model.kind, tp=tp) * rounds
        moved += context / model.replicas * costs.kv_bytes_per_token(model.kind, tp=tp)
        return self._job(step, tokens, rounds * each, share, moved)

    def _share(self, turn: StepKey, own: float) -> float:
        return own if self._compute is None else self._compute.taken(turn)

    def _job(
        self, step: Step, tokens: list[list[int]], seconds: float, share: float, moved: float
    ) -> SimulatedJob:
        traffic = moved / seconds / self._bandwidth if self._bandwidth else 0.0
        return SimulatedJob(step, tokens, self.now, seconds, seconds, share, min(1.0, traffic))

    # Side by side

    def _bring_up_to(self, now: float) -> None:
        done = (now - self._then) / self._slowdown
        self._then = now
        if done > 0:
            for job in self._jobs:
                job.left -= done

    def _contend(self) -> None:
        share = traffic = 0.0
        for job in self._jobs:
            share += job.share
            traffic += job.traffic
        self._slowdown = max(1.0, share, traffic)


def _slots_and_counts(step: Decode) -> Iterable[tuple[int, int]]:
    """The slot of each sequence and how many tokens it makes."""
    sequences = step.sequences
    if isinstance(sequences, DecodeBatch):  # as the scheduler makes them: no object for each
        return zip(sequences.slots.tolist(), sequences.num_tokens.tolist(), strict=True)
    return [(sequence.slot, sequence.num_tokens) for sequence in sequences]


def _left(job: SimulatedJob) -> float:
    return job.left
