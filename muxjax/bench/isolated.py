"""How long requests take with nothing beside them, measured on the engine: what targets are
multiples of. It also gives schedulers step times to begin with, and warms everything up.
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
    """What was measured.

    Attributes:
      costs: times of requests alone, for `placement.metrics.Target`; a model's kind is its name.
      estimates: step times, for `BenchSession.unit`.
      rows: for people: model, prompt tokens, TTFT and TPOT in seconds.
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
    """Runs requests of each model alone, with the shortest, the median and the longest prompt of
    the workload, in turn, and then a few at once.

    Raises:
      WorkloadError: a request that a model cannot take.
    """
    vocab = {name: model.config.vocab_size for name, model in session.models.items()}
    limits = {name: model.max_model_len for name, model in session.models.items()}
    grid = {name: _prompts(workload, name) for name in session.models}
    unit = session.new_scheduler(session.config.policy)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}

    def run(requests: list[TraceRequest]) -> list[tuple[float, float]]:
        result = replay(engine, requests, _numbered(build_requests(requests, vocab, limits)))
        if result.interrupted:
            raise KeyboardInterrupt
        return [(record.ttft or 0.0, record.tpot or 0.0) for record in result.records]

    with session.engine(unit) as engine:
        for repeat in range(repeats + 1):
            for name, prompts in grid.items():
                for prompt in prompts:
                    output = max(2, min(_OUTPUT, limits[name] - prompt))
                    (times,) = run([TraceRequest(0.0, name, prompt, output)])
                    if repeat:  # the first warms up
                        found.setdefault((name, prompt), []).append(times)
                    if done is not None:
                        done(1)
    rows = [
        {
            "model": name,
            "prompt_tokens": prompt,
            "ttft_s": median(ttft for ttft, _ in times),
            "tpot_s": median(tpot for _, tpot in times),
        }
        for (name, prompt), times in found.items()
    ]
    return IsolatedLatency(_table(session, rows), warm_up(session), rows)


def warm_up(session: BenchSession) -> StepEstimates:
    """Runs waves of requests of each model in turn, of several sizes.

    Returns:
      The step times that were seen.
    """
    vocab = {name: model.config.vocab_size for name, model in session.models.items()}
    limits = {name: model.max_model_len for name, model in session.models.items()}
    with session.engine(session.new_scheduler(session.config.policy)) as engine:
        for size in _WAVES:
            for name, limit in limits.items():
                tokens = max(1, min(_OUTPUT, limit // 3))
                wave = min(size, session.buckets[name].max_seqs)
                requests = [TraceRequest(0.0, name, tokens, tokens)] * wave
                done = replay(engine, requests, _numbered(build_requests(requests, vocab, limits)))
                if done.interrupted:
                    raise KeyboardInterrupt
        return engine.call(lambda unit: unit.estimates)


def _prompts(workload: Sequence[TraceRequest], name: str) -> list[int]:
    lengths = sorted(asked.prompt_tokens for asked in workload if asked.model == name)
    if not lengths:
        return [1]
    return sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})


_NUMBERS = iter(range(1 << 40, 1 << 60))


def _numbered(requests: list[Any]) -> list[Any]:
    """With ids that no other request of the unit has."""
    for request in requests:
        request.id = next(_NUMBERS)
    return requests


def _table(session: BenchSession, rows: Sequence[dict[str, Any]]) -> ProfileTable:
    profile: dict[str, Any] = {}
    for row in rows:
        if row["ttft_s"] <= 0 or row["tpot_s"] <= 0:
            raise BenchError(
                f"{row['model']}: a request alone took no time: the clock is too rough"
            )
        cells = profile.setdefault(row["model"], {"1": {"100": {"1": {}}}})["1"]["100"]["1"]
        cells[str(row["prompt_tokens"])] = {
            "prefill": 1e3 * row["ttft_s"],
            "decoding": 1e3 * row["tpot_s"],
        }
    return ProfileTable(profile, session.shapes)
