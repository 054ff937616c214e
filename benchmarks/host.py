"""Host time between two steps, and how it scales.

    python benchmarks/host.py [--json] [--turns 600]

1. `next_step` of every policy, with 512 running and 10,000 waiting requests in 16 models: evenly
   distributed or all for one model, with enough pages or with a shortage of pages. Requests that
   end are replaced, so that some steps are prefills.
2. All host work of a step at batch 256: `next_step`, `submit`, `result`, `apply` and the streams.
   The executor is real, but its programs return prepared tokens at once, so that only host work
   is measured.

The medians are compared with limits of 100 and 500 microseconds; p99 is shown. A value of `of
limit` above 1 exceeds the limit. No weights are needed.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from muxjax.bench.host_turn import MEAN_TOKENS, Feed, Times, time_turns
from muxjax.bench.machine import describe_machine
from muxjax.bench.script_output import print_json, print_table
from muxjax.scheduling.policies.registry import create_policy, policy_names
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import BucketLimits, ModelSpec
from muxjax.scheduling.steps import DecodeBatch, Prefill, Step, StepResult

NEXT_STEP_LIMIT = 100e-6
TURN_LIMIT = 500e-6
TOKENS_PER_PAGE = 16
LAYERS = 4


@dataclass(frozen=True)
class HostLoad:
    """The load of a unit.

    Attributes:
      policy: name of the policy.
      running: running sequences of all models; they fill all slots.
      waiting: waiting requests.
      models: number of models.
      spread: whether requests wait 'evenly' for all models or for 'one'.
      pages: 'enough', or 'short': for about half of the running sequences.
      cache: whether there is a prefix cache. No two prompts share a prefix, so the cache only adds
        cost: hashing at admission and at the end of a request, and evictions.
    """

    policy: str = "adbs"
    running: int = 512
    waiting: int = 10_000
    models: int = 16
    spread: str = "evenly"
    pages: str = "enough"
    cache: int = 1


def specs_for(load: HostLoad) -> list[ModelSpec]:
    """Builds model specs with one slot for each running sequence."""
    slots = load.running // load.models
    if load.pages == "short":
        slots *= 2
    limits = BucketLimits(max_seqs=slots, max_prefill_tokens=2048, max_decode_tokens=8)
    return [
        ModelSpec(f"model{i}", LAYERS, TOKENS_PER_PAGE, 2048, limits) for i in range(load.models)
    ]


def pages_for(load: HostLoad) -> int:
    """Number of pages of the pool."""
    tokens = 2 * MEAN_TOKENS if load.pages == "enough" else MEAN_TOKENS // 2
    return LAYERS * (1 + load.running * -(-tokens // TOKENS_PER_PAGE))


def fake_result(step: Step) -> StepResult:
    """Returns tokens for every sequence; none is a stop token."""
    if isinstance(step, Prefill):
        tokens = [[1] if chunk.last else [] for chunk in step.chunks]
    else:
        counts = DecodeBatch.from_sequences(step.sequences).num_tokens.tolist()
        tokens = [[1] * count for count in counts]
    return StepResult(tokens, [None] * len(tokens), 0.0, 0.02)


def time_next_step(load: HostLoad, turns: int) -> tuple[Times, Times, dict[str, int]]:
    """Times `next_step` of a unit whose load stays constant."""
    specs = specs_for(load)
    policy = create_policy(load.policy)
    unit = Scheduler(specs, pages_for(load), policy, prefix_cache=bool(load.cache))
    feed, names = Feed(), [spec.name for spec in specs]
    for index in range(load.running):
        unit.add(feed.request(names[index % len(names)], fresh=False))
    now, pending = 0.0, None
    scheduled, applied = Times(), Times()
    # The waiting requests are added when all slots are filled.
    for _ in range(4 * load.running):
        pending, now, ended = _turn(unit, pending, now)
        for model in ended:
            unit.add(feed.request(model, fresh=False))
        if not any(state.waiting for state in unit.models.values()):
            break
    targets = names if load.spread == "evenly" else names[:1]
    for index in range(load.waiting):
        unit.add(feed.request(targets[index % len(targets)]))
    for turn in range(turns + turns // 4):
        measured = turn >= turns // 4
        pending, now, ended = _turn(unit, pending, now, scheduled if measured else None, applied)
        for model in ended:
            unit.add(feed.request(model))
    states = unit.models.values()
    return (
        scheduled,
        applied,
        {
            "running": sum(len(state.running) + len(state.prefilling) for state in states),
            "waiting": sum(len(state.waiting) for state in states),
        },
    )


def _turn(
    unit: Scheduler,
    pending: Step | None,
    now: float,
    scheduled: Times | None = None,
    applied: Times | None = None,
) -> tuple[Step | None, float, list[str]]:
    """Runs one step; returns the models whose requests have ended."""
    ended: list[str] = []
    began = time.perf_counter()
    step = unit.next_step(now)
    duration = time.perf_counter() - began
    if scheduled is not None:
        scheduled.seconds.append(duration)
    if pending is not None:
        result = fake_result(pending)
        began = time.perf_counter()
        updates = unit.apply(pending, result, now)
        if applied is not None:
            applied.seconds.append(time.perf_counter() - began)
        ended = [update.request.model for update in updates if update.finish_reason]
    return step, now + 0.02, ended


GROWTH: dict[str, list[int]] = {
    "running": [64, 256, 512, 1024],
    "waiting": [100, 1_000, 10_000, 100_000],
    "models": [1, 4, 16, 64],
    "cache": [0, 1],
}


@contextmanager
def no_collector() -> Iterator[None]:
    """Disables Python's garbage collector; complete steps are timed with the collector."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def next_step_row(load: HostLoad, turns: int) -> dict[str, Any]:
    """Measures one load; returns a row of the first tables."""
    with no_collector():
        scheduled, applied, sizes = time_next_step(load, turns)
    return {
        **asdict(load),
        **sizes,
        **scheduled.row(NEXT_STEP_LIMIT),
        "apply_us": float(np.median(applied.seconds)) * 1e6,
    }


def varied_loads(name: str, values: list[int]) -> list[HostLoad]:
    """Default loads with different values of one field."""
    changes: list[dict[str, Any]] = [{name: value} for value in values]
    return [replace(HostLoad(), **change) for change in changes]


def main() -> None:
    """Runs the cases and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--turns", type=int, default=600, help="number of steps of each case")
    args = parser.parse_args()
    cases = [
        HostLoad(policy=policy, spread=spread, pages=pages)
        for policy in policy_names()
        for spread in ("evenly", "one")
        for pages in ("enough", "short")
    ]
    rows = [next_step_row(load, args.turns) for load in cases]
    growth = [
        {"varied": name, **next_step_row(load, args.turns)}
        for name, values in GROWTH.items()
        for load in varied_loads(name, values)
    ]
    turns = [
        {"batch": batch, "burst": burst, **time_turns(batch, burst, TURN_LIMIT)}
        for burst in (1, 8)
        for batch in (16, 64, 256, 512)
    ]
    if args.json:
        limits = {"next_step_us": NEXT_STEP_LIMIT * 1e6, "turn_us": TURN_LIMIT * 1e6}
        report = {"limits": limits, "next_step": rows, "growth": growth, "turn": turns}
        print_json(report | describe_machine())
        return
    figures = ("median_us", "p99_us", "of_limit", "apply_us")
    print_table("next_step", ("policy", "spread", "pages", "running", "waiting", *figures), rows)
    varied = ("varied", "running", "waiting", "models", "cache", *figures)
    print_table("How next_step scales (adbs)", varied, growth)
    parts = ("next_step_us", "submit_us", "result_us", "apply_us", "streams_us", "readers_us")
    columns = ("batch", "burst", "median_us", "p99_us", "of_limit", *parts)
    print_table("Host work between two decode steps", columns, turns)


if __name__ == "__main__":
    main()
