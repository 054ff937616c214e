"""Replays a workload on an engine in this process, each request at its time.

The load is open: a request is due when the workload says, however far behind the engine is, and its
latency counts from then. Prompts are random token ids of the workload's lengths; stop tokens are
ignored, so that outputs have the workload's lengths too. Nothing is detokenised.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from muxjax.engine.engine import Engine
from muxjax.errors import InvalidRequest, MuxError, WorkloadError
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.workload.trace import TraceRequest
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.requests import Request, RequestUpdate

LEAD_SECONDS = 0.05
"""From the start to the first request that may be due, for the thread to be ready."""


@dataclass
class Replay:
    """A finished run.

    Attributes:
      records: of requests that ended, in the workload's order; times from the run's start.
      seconds: from the start to the last one's end.
      interrupted: requests that an interrupt left unfinished, or never sent.
      late: the most that a request was sent after it was due, in seconds: where it is not small
        against the latencies, the machine was too busy to make the load.
    """

    records: list[RequestRecord]
    seconds: float
    interrupted: int = 0
    late: float = 0.0


@dataclass
class _Sink:
    """Notes a request's end; see `engine.Sink`."""

    ended: Callable[[], None]
    error: BaseException | None = None
    over: bool = False
    cancelled_: bool = field(default=False)

    def update(self, update: RequestUpdate) -> bool:
        if update.finish_reason is not None:
            self._end()
        return False

    def cancelled(self) -> None:
        self.cancelled_ = True
        self._end()

    def failed(self, error: BaseException) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        self.over = True
        self.ended()


def build_requests(
    workload: Sequence[TraceRequest],
    vocab: dict[str, int],
    limits: dict[str, int],
    seed: int = 0,
) -> list[Request]:
    """The requests of a workload, their prompts drawn.

    Args:
      workload: in order of arrival.
      vocab: number of token ids of each model.
      limits: the most tokens of a sequence, of each model.
      seed: of the prompts.

    Raises:
      WorkloadError: a model that there is not, or a prompt that leaves no room for an output.
    """
    rng = np.random.default_rng([seed, 4])
    requests = []
    for index, asked in enumerate(workload):
        if asked.model not in vocab:
            raise WorkloadError(
                f"request {index} asks for {asked.model}, which the fleet does not have; there "
                f"are {', '.join(vocab)}"
            )
        if asked.prompt_tokens >= limits[asked.model]:
            raise WorkloadError(
                f"request {index} has a prompt of {asked.prompt_tokens} tokens; {asked.model} "
                f"takes at most {limits[asked.model] - 1}: shorten the workload's prompts or raise "
                f"`max_model_len`"
            )
        prompt = rng.integers(vocab[asked.model], size=asked.prompt_tokens).tolist()
        params = SamplingParams(
            max_tokens=asked.output_tokens, temperature=0.0, ignore_eos=True, seed=index
        )
        requests.append(Request(index, asked.model, prompt, params))
    return requests


def replay(
    engine: Engine,
    workload: Sequence[TraceRequest],
    requests: Sequence[Request],
    *,
    unit: str = "unit",
    done: Callable[[int], None] | None = None,
) -> Replay:
    """Sends every request when it is due, and waits until all have ended.

    Ctrl-C ends the run: what is under way is cancelled, what has ended is kept.

    Args:
      engine: with no other requests.
      workload: when, in order of arrival.
      requests: what, from `build_requests`; used once.
      unit: name for the records.
      done: told how many more have ended, now and then, in this thread.

    Raises:
      EngineDead: the engine ended before the requests did.
    """
    ended = threading.Semaphore(0)
    sinks = [_Sink(ended.release) for _ in requests]
    start = time.perf_counter() + LEAD_SECONDS
    sent = finished = 0
    late = 0.0
    stopped = False

    def wait(seconds: float) -> None:
        nonlocal finished
        limit = time.perf_counter() + seconds
        while (left := limit - time.perf_counter()) > 0:
            if not ended.acquire(timeout=left):
                return
            finished += 1
            if done is not None:
                done(1)
            if finished == len(requests):
                return

    try:
        for asked, request, sink in zip(workload, requests, sinks, strict=True):
            due = start + asked.arrival
            while (left := due - time.perf_counter()) > 0:
                wait(left) if finished < sent else time.sleep(left)
            request.arrival = due
            engine.submit(request, sink)
            sent += 1
            late = max(late, time.perf_counter() - due)
        while finished < len(requests):
            wait(1.0)
    except KeyboardInterrupt:
        stopped = True
        for request in requests[:sent]:
            engine.cancel(request.id)
        for sink in sinks[:sent]:
            while not sink.over and engine.alive:
                time.sleep(0.001)
    for sink in sinks:
        if sink.error is not None and not isinstance(sink.error, MuxError):
            raise sink.error
        if sink.error is not None and not engine.alive:
            raise sink.error
    records = [
        _record(index, unit, asked, request, sink, start)
        for index, (asked, request, sink) in enumerate(zip(workload, requests, sinks, strict=True))
        if sink.over and not sink.cancelled_
    ]
    end = max((record.end or 0.0 for record in records), default=0.0)
    return Replay(records, end, len(requests) - len(records) if stopped else 0, late)


def _record(
    index: int, unit: str, asked: TraceRequest, request: Request, sink: _Sink, start: float
) -> RequestRecord:
    if sink.error is not None:
        refused = isinstance(sink.error, InvalidRequest)
        return RequestRecord(
            index,
            asked.model,
            unit,
            "rejected" if refused else "failed",
            asked.arrival,
            asked.prompt_tokens,
            asked.output_tokens,
            reason=str(sink.error),
        )
    first, last = request.first_token_at, request.finished_at
    return RequestRecord(
        index,
        asked.model,
        unit,
        "finished",
        asked.arrival,
        asked.prompt_tokens,
        asked.output_tokens,
        made_tokens=len(request.output),
        first_token=None if first is None else first - start,
        end=None if last is None else last - start,
        preemptions=request.preemptions,
    )
