"""Measures isolated latencies on the engine: the latency of a request with no other load.

Latency targets are multiples of isolated latencies. The measurement also warms up the programs and
gives schedulers initial step times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from muxjax.bench.replay import build_requests, replay
from muxjax.bench.session import BenchSession
from muxjax.errors import BenchError
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.workload.trace import TraceRequest
from muxjax.scheduling.estimates import StepEstimates

REPEATS = 3
_OUTPUT = 24
_WAVES = (1, 4, 8, 16)


@dataclass(frozen=True)
class IsolatedLatency:
    """Isolated latencies of a fleet's models.

    Attributes:
      costs: isolated latencies, for `AttainmentCriterion`; a model's kind is its name.
      estimates: step times, for `BenchSession.new_scheduler`.
      rows: model, prompt tokens, TTFT and TPOT in seconds, for reports.
    """

    costs: ProfileTable
    estimates: StepEstimates
    rows: list[dict[str, Any]]


def measure_isolated(
    session: BenchSession,
    workload: Sequence[TraceRequest],
    *,
    repeats: int = REPEATS,
    done: Callable[[int], None] | None = None,
) -> IsolatedLatency:
    """Measures each model with the shortest, median and longest prompt of the workload, then warms
    up.

    Raises:
      WorkloadError: a request that is too long for its model.
    """
    vocab = {name: model.config.vocab_size for name, model in session.models.items()}
    limits = {name: model.max_model_len for name, model in session.models.items()}
    grid = {name: _prompts(workload, name) for name in session.models}
    scheduler = session.new_scheduler(session.config.policy)
    samples: dict[tuple[str, int], list[tuple[float, float]]] = {}

    def run(requests: list[TraceRequest]) -> list[tuple[float, float]]:
        result = replay(engine, requests, _numbered(build_requests(requests, vocab, limits)))
        if result.interrupted:
            raise KeyboardInterrupt
        return [(record.ttft or 0.0, record.tpot or 0.0) for record in result.records]

    with session.engine(scheduler) as engine:
        for repeat in range(repeats + 1):
            for name, prompts in grid.items():
                for prompt in prompts:
                    output = max(2, min(_OUTPUT, limits[name] - prompt))
                    (times,) = run([TraceRequest(0.0, name, prompt, output)])
                    if repeat:  # the first repetition is a warm-up
                        samples.setdefault((name, prompt), []).append(times)
                    if done is not None:
                        done(1)
    rows = [
        {
            "model": name,
            "prompt_tokens": prompt,
            "ttft_s": median(ttft for ttft, _ in times),
            "tpot_s": median(tpot for _, tpot in times),
        }
        for (name, prompt), times in samples.items()
    ]
    return IsolatedLatency(_table(session, rows), warm_up(session), rows)


def warm_up(session: BenchSession) -> StepEstimates:
    """Runs batches of requests of several sizes for each model.

    Returns:
      The measured step times.
    """
    vocab = {name: model.config.vocab_size for name, model in session.models.items()}
    limits = {name: model.max_model_len for name, model in session.models.items()}
    with session.engine(session.new_scheduler(session.config.policy)) as engine:
        for size in _WAVES:
            for name, limit in limits.items():
                tokens = max(1, min(_OUTPUT, limit // 3))
                wave = min(size, session.buckets[name].max_seqs)
                requests = [TraceRequest(0.0, name, tokens, tokens)] * wave
                result = replay(
                    engine, requests, _numbered(build_requests(requests, vocab, limits))
                )
                if result.interrupted:
                    raise KeyboardInterrupt
        return engine.call(lambda scheduler: scheduler.estimates)


def _prompts(workload: Sequence[TraceRequest], name: str) -> list[int]:
    lengths = sorted(entry.prompt_tokens for entry in workload if entry.model == name)
    if not lengths:
        return [1]
    return sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})


_NUMBERS = iter(range(1 << 40, 1 << 60))


def _numbered(requests: list[Any]) -> list[Any]:
    """Gives requests ids that are unique in the process."""
    for request in requests:
        request.id = next(_NUMBERS)
    return requests


def _table(session: BenchSession, rows: Sequence[dict[str, Any]]) -> ProfileTable:
    profile: dict[str, Any] = {}
    for row in rows:
        if row["ttft_s"] <= 0 or row["tpot_s"] <= 0:
            raise BenchError(
                f"{row['model']}: an isolated request took no time: the clock is too coarse"
            )
        cells = profile.setdefault(row["model"], {"1": {"100": {"1": {}}}})["1"]["100"]["1"]
        cells[str(row["prompt_tokens"])] = {
            "prefill": 1e3 * row["ttft_s"],
            "decoding": 1e3 * row["tpot_s"],
        }
    return ProfileTable(profile, session.shapes)
