"""Host time of a turn: one complete engine step on a device that takes no time.

Used by `benchmarks/host.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.engine.detokenizer import Detokenizer
from muxjax.engine.engine import Engine
from muxjax.engine.stream import Stream
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.executor.mesh import ModelMesh
from muxjax.executor.programs import Buckets, ModelPrograms
from muxjax.executor.sampler import Logprobs
from muxjax.executor.step_functions import StepOutput
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.requests import FinishReason, Request, RequestUpdate
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import BucketLimits, ModelSpec
from muxjax.scheduling.steps import Decode, DecodeBatch, Step, StepResult

PROMPT, OUTPUT = 161, 338
"""Mean lengths of MuxServe's workloads."""
MEAN_TOKENS = PROMPT + OUTPUT
TURNS = 200
"""Steps of a run of `time_turns`."""


@dataclass
class Times:
    """Durations of calls, in seconds."""

    seconds: list[float] = field(default_factory=list)

    def row(self, limit: float) -> dict[str, float]:
        """Returns microseconds, and the median as a fraction of the limit."""
        median, p99 = np.percentile(self.seconds, [50, 99])
        return {"median_us": median * 1e6, "p99_us": p99 * 1e6, "of_limit": median / limit}


class Feed:
    """Generates requests of different lengths."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._count = 0

    def request(self, model: str, *, fresh: bool = True) -> Request:
        """Builds a request; with `fresh=False`, one in the middle of its output."""
        prompt = int(self._random.integers(PROMPT // 2, PROMPT * 3 // 2))
        output = int(self._random.integers(OUTPUT // 2, OUTPUT * 3 // 2))
        if not fresh:
            output = int(self._random.integers(8, output + 1))
        self._count += 1
        params = SamplingParams(max_tokens=output, temperature=0.0)
        tokens = self._random.integers(3, 2**15, prompt).tolist()
        return Request(self._count, model, tokens, params, stop_ids=(2,))


class FakePrograms:
    """Replaces the compiled programs of a model and returns prepared results.

    Every token is `1`. The results are JAX arrays, so that reading them has its real cost.

    Attributes:
      seconds: time spent in this object.
      counts: remaining tokens of each sequence of the next decode.
    """

    def __init__(self, spec: ModelSpec, batch: int) -> None:
        limits = spec.limits
        self.name = spec.name
        self.vocab_size = 64
        self.parameters = ()
        self.mesh = ModelMesh((jax.devices()[0],))
        self.buckets = Buckets(
            prefill_tokens=(limits.max_prefill_tokens,),
            prefill_seqs=limits.max_prefill_seqs,
            decode_seqs=(batch,),
            blocks=spec.blocks_for(spec.max_model_len),
        )
        self.seconds = 0.0
        self.counts = np.zeros(0, np.int64)
        self.streams: list[Stream] = []
        self.drained = 0
        self._longest = limits.max_decode_tokens
        self._logprobs = Logprobs.zeros(1, 1)

    def prefill(self, size: int) -> Callable[..., Any]:
        """Returns a prefill program that samples a token for every row."""
        del size
        return lambda parameters, kv, state, tokens, packed, *rest: self._run(
            kv, state, np.ones((1, len(packed)), np.int32)
        )

    def decode(self, size: int) -> Callable[..., Any]:
        """Returns a decode program that generates `counts` tokens."""

        def run(parameters: Any, kv: Any, state: Any, *inputs: Any) -> Any:
            del parameters, inputs
            began = time.perf_counter()
            tokens = np.full((self._longest, size), -1, np.int32)
            rounds = np.arange(self._longest)[:, None]
            tokens[:, : len(self.counts)][rounds < self.counts] = 1
            self.seconds += time.perf_counter() - began
            return self._run(kv, state, tokens)

        return run

    def drain(self) -> None:
        """Empties the streams and counts the tokens, as readers would consume them."""
        for stream in self.streams:
            self.drained += sum(
                len(item.tokens) for item in stream.sink.queue if isinstance(item, RequestUpdate)
            )
            stream.sink.queue.clear()

    def _run(self, kv: Any, state: Any, tokens: np.ndarray) -> Any:
        began = time.perf_counter()
        self.drain()
        output = StepOutput(jnp.asarray(tokens), self._logprobs, self._logprobs)
        self.seconds += time.perf_counter() - began
        return kv, state, output


@dataclass
class Clock:
    """Seconds of each step and of its parts by name, without the time of `FakePrograms`."""

    programs: FakePrograms
    parts: dict[str, list[float]] = field(default_factory=dict)
    turns: list[float] = field(default_factory=list)
    _began: float = 0.0
    _fake: float = 0.0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with its calls timed."""
        durations = self.parts.setdefault(name, [])

        def run(*args: Any) -> Any:
            fake, began = self.programs.seconds, time.perf_counter()
            result = function(*args)
            durations.append(time.perf_counter() - began - (self.programs.seconds - fake))
            return result

        return run

    def turn(self) -> None:
        """Ends the current step; called when a decode has been submitted."""
        now = time.perf_counter()
        if self._began:
            self.turns.append(now - self._began - (self.programs.seconds - self._fake))
        self._began, self._fake = now, self.programs.seconds


class TimedExecutor(JaxExecutor):
    """The real executor; records when decodes are submitted."""

    def __init__(self, clock: Clock, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = clock
        self._submit = clock.timed("submit", super().submit)
        self._result = clock.timed("result", super().result)

    def submit(self, step: Step) -> Any:
        """See `Executor.submit`; records the step."""
        if isinstance(step, Decode):
            self._clock.programs.counts = DecodeBatch.from_sequences(step.sequences).num_tokens
        handle = self._submit(step)
        if isinstance(step, Decode):
            self._clock.turn()
        return handle

    def result(self, handle: Any) -> StepResult:
        """See `Executor.result`; timed."""
        return self._result(handle)


class TimedUnit(Scheduler):
    """The real scheduler, timed."""

    clock: Clock

    def next_step(self, now: float) -> Step | None:
        """See `Scheduler.next_step`; timed."""
        return self.clock.timed("next_step", super().next_step)(now)

    def apply(self, step: Step, result: StepResult, now: float) -> list[RequestUpdate]:
        """See `Scheduler.apply`; timed."""
        return self.clock.timed("apply", super().apply)(step, result, now)


def time_readers(batch: int, burst: int) -> float:
    """Seconds that the reader threads of a batch need for the output of a step."""
    tokenizer = byte_tokenizer(260)
    request = Request(0, "model", [1] * 16)
    streams = [
        Stream(0, [1] * 16, Detokenizer(tokenizer, ()), lambda _: None) for _ in range(batch)
    ]
    rounds = 8
    for index in range(rounds):
        reason: FinishReason | None = "length" if index == rounds - 1 else None
        for stream in streams:
            stream.sink.update(RequestUpdate(request, [97] * burst, None, reason))
    began = time.perf_counter()
    for stream in streams:
        for _ in stream:
            pass
    return (time.perf_counter() - began) / rounds


def time_turns(batch: int, burst: int, limit: float) -> dict[str, float]:
    """Times the host work between two decode steps of a full batch, its parts, and the readers.

    Args:
      batch: sequences of one model that decode together and end at the same time.
      burst: tokens that a decode generates for each sequence.
      limit: limit of a step, in seconds.
    """
    limits = BucketLimits(max_seqs=batch, max_prefill_tokens=2048, max_decode_tokens=burst)
    length = 16 + TURNS * burst + 1
    spec = ModelSpec("model", 4, 16, length, limits)
    programs = FakePrograms(spec, batch)
    pages = 4 * (1 + batch * (spec.blocks_for(length) + 1))
    clock = Clock(programs)
    unit = TimedUnit([spec], pages, create_policy("adbs"))
    unit.clock = clock
    executor = TimedExecutor(
        clock,
        jax.devices()[:1],
        {"model": cast(ModelPrograms, programs)},
        jax.ShapeDtypeStruct((1, 1, 1), jnp.float32),
        dummy_pages=4,
    )
    engine = Engine(unit, executor)
    tokenizer = byte_tokenizer(260)
    params = SamplingParams(max_tokens=length - 16, temperature=0.0)
    try:
        for number in range(batch):
            stream = Stream(number, [1] * 16, Detokenizer(tokenizer, ()), engine.cancel)
            programs.streams.append(stream)
            engine.submit(Request(number, "model", [1] * 16, params, stop_ids=(2,)), stream.sink)
        while engine.alive and not all(stream.sink.ended for stream in programs.streams):
            time.sleep(0.05)
    finally:
        engine.close()
    programs.drain()
    assert programs.drained == batch * params.max_tokens, "a request ended early"

    # The first steps are prefills, and in the last steps requests end.
    turns = clock.turns[TURNS // 4 : TURNS * 3 // 4]
    parts = {name: float(np.median(durations)) * 1e6 for name, durations in clock.parts.items()}
    times = Times(turns).row(limit)
    return {
        **times,
        **{f"{name}_us": value for name, value in parts.items()},
        "streams_us": max(0.0, times["median_us"] - sum(parts.values())),
        "readers_us": time_readers(batch, burst) * 1e6,
    }
