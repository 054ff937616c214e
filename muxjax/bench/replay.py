"""Replays a workload on an engine in this process, each request at its time.

The load is open-loop: a request is due at its time in the workload, even if the engine is behind,
and its latency counts from then. Prompts are random token ids with the workload's lengths. Stop
tokens are ignored, so that outputs have the workload's lengths. Nothing is detokenized.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from muxjax.engine.engine import Engine
from muxjax.errors import InvalidRequest, MuxError, WorkloadError
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.workload.trace import TraceRequest
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.requests import Request, RequestUpdate

LEAD_SECONDS = 0.05
"""Seconds from the start to the first due time, for the thread to be ready."""


@dataclass
class Replay:
    """A finished run.

    Attributes:
      records: records of finished requests, in workload order; times from the start of the run.
      seconds: seconds from the start to the end of the last request.
      interrupted: number of requests that an interrupt left unfinished or unsent.
      late: maximum delay of sending a request, in seconds. If it is not small compared with the
        latencies, the machine was too busy to generate the load.
    """

    records: list[RequestRecord]
    seconds: float
    interrupted: int = 0
    late: float = 0.0


@dataclass
class _Sink:
    """Records the end of a request; see `engine.Sink`."""

    on_end: Callable[[], None]
    error: BaseException | None = None
    ended: bool = False
    was_cancelled: bool = False

    def update(self, update: RequestUpdate) -> bool:
        if update.finish_reason is not None:
            self._end()
        return False

    def cancelled(self) -> None:
        self.was_cancelled = True
        self._end()

    def failed(self, error: BaseException) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        self.ended = True
        self.on_end()


def build_requests(
    workload: Sequence[TraceRequest],
    vocab: dict[str, int],
    limits: dict[str, int],
    seed: int = 0,
) -> list[Request]:
    """The requests of a workload, with random prompts.

    Args:
      workload: requests in order of arrival.
      vocab: vocabulary size of each model.
      limits: maximum sequence length of each model.
      seed: seed of the prompts.

    Raises:
      WorkloadError: an unknown model, or a prompt that leaves no room for output.
    """
    rng = np.random.default_rng([seed, 4])
    requests = []
    for index, entry in enumerate(workload):
        if entry.model not in vocab:
            raise WorkloadError(
                f"request {index} is for {entry.model}, which the fleet does not have; there "
                f"are {', '.join(vocab)}"
            )
        if entry.prompt_tokens >= limits[entry.model]:
            raise WorkloadError(
                f"request {index} has a prompt of {entry.prompt_tokens} tokens; {entry.model} "
                f"accepts at most {limits[entry.model] - 1}: shorten the prompts or raise "
                f"`max_model_len`"
            )
        prompt = rng.integers(vocab[entry.model], size=entry.prompt_tokens).tolist()
        params = SamplingParams(
            max_tokens=entry.output_tokens, temperature=0.0, ignore_eos=True, seed=index
        )
        requests.append(Request(index, entry.model, prompt, params))
    return requests


def replay(
    engine: Engine,
    workload: Sequence[TraceRequest],
    requests: Sequence[Request],
    *,
    unit: str = "unit",
    done: Callable[[int], None] | None = None,
) -> Replay:
    """Sends every request at its due time and waits until all have ended.

    Ctrl-C ends the run: running requests are cancelled, and finished ones are kept.

    Args:
      engine: an engine without other requests.
      workload: due times, in order of arrival.
      requests: the requests, from `build_requests`; can be used once.
      unit: name of the unit in the records.
      done: called in this thread with the number of requests that ended since the last call.

    Raises:
      EngineDead: the engine stopped before the requests ended.
    """
    ended = threading.Semaphore(0)
    sinks = [_Sink(ended.release) for _ in requests]
    start = time.perf_counter() + LEAD_SECONDS
    sent = finished = 0
    late = 0.0
    stopped = False

    def wait(seconds: float) -> None:
        nonlocal finished
        deadline = time.perf_counter() + seconds
        while (left := deadline - time.perf_counter()) > 0:
            if not ended.acquire(timeout=left):
                return
            finished += 1
            if done is not None:
                done(1)
            if finished == len(requests):
                return

    try:
        for entry, request, sink in zip(workload, requests, sinks, strict=True):
            due = start + entry.arrival
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
            while not sink.ended and engine.alive:
                time.sleep(0.001)
    for sink in sinks:
        if sink.error is not None and not isinstance(sink.error, MuxError):
            raise sink.error
        if sink.error is not None and not engine.alive:
            raise sink.error
    records = [
        _record(index, unit, entry, request, sink, start)
        for index, (entry, request, sink) in enumerate(zip(workload, requests, sinks, strict=True))
        if sink.ended and not sink.was_cancelled
    ]
    end = max((record.end or 0.0 for record in records), default=0.0)
    return Replay(records, end, len(requests) - len(records) if stopped else 0, late)


def _record(
    index: int, unit: str, entry: TraceRequest, request: Request, sink: _Sink, start: float
) -> RequestRecord:
    if sink.error is not None:
        rejected = isinstance(sink.error, InvalidRequest)
        return RequestRecord(
            index,
            entry.model,
            unit,
            "rejected" if rejected else "failed",
            entry.arrival,
            entry.prompt_tokens,
            entry.output_tokens,
            reason=str(sink.error),
        )
    first, last = request.first_token_at, request.finished_at
    return RequestRecord(
        index,
        entry.model,
        unit,
        "finished",
        entry.arrival,
        entry.prompt_tokens,
        entry.output_tokens,
        made_tokens=len(request.output),
        first_token=None if first is None else first - start,
        end=None if last is None else last - start,
        preemptions=request.preemptions,
    )
