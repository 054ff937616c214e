"""What the host does between two steps, and how it grows.

    python benchmarks/host.py [--json] [--quick]

1. `next_step` of every policy, with 512 running and 10,000 waiting requests in 16 models: waiting
   evenly or all for one model, with pages enough or with as few as hold the running ones. As
   requests end, others take their places, so that prefills are among the steps.
2. A whole turn of the engine at batch 256: `next_step`, `submit`, `result`, `apply` and the
   streams. The executor is the real one; the device is not: its programs return at once with tokens
   that were made before, so that all that is left is the host's work.

Each is compared with a limit, 100 and 500 microseconds, by its median; p99 is shown. `of limit`
above 1 is beyond it. Nothing here needs weights.
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
from _common import print_json, show, surroundings
from _host_turn import MOST_TOKENS, Feed, Times, time_turns

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
    """What a unit has to do.

    Attributes:
      policy: its name.
      running: sequences with pages, over all models: all slots.
      waiting: requests in line.
      models: how many.
      spread: whether requests wait 'evenly' or for 'one' model.
      pages: 'enough', or 'short': for about half of what may run.
      cache: whether there is a prefix cache. No two prompts begin alike, so it is all cost: hashes
        when a request is admitted and when it ends, and evictions.
    """

    policy: str = "adbs"
    running: int = 512
    waiting: int = 10_000
    models: int = 16
    spread: str = "evenly"
    pages: str = "enough"
    cache: int = 1


def specs_for(load: HostLoad) -> list[ModelSpec]:
    """Models with as many slots together as are to run."""
    slots = load.running // load.models
    if load.pages == "short":
        slots *= 2
    limits = BucketLimits(max_seqs=slots, max_prefill_tokens=2048, max_decode_tokens=8)
    return [
        ModelSpec(f"model{i}", LAYERS, TOKENS_PER_PAGE, 2048, limits) for i in range(load.models)
    ]


def pages_for(load: HostLoad) -> int:
    """Pages of the pool."""
    tokens = 2 * MOST_TOKENS if load.pages == "enough" else MOST_TOKENS // 2
    return LAYERS * (1 + load.running * -(-tokens // TOKENS_PER_PAGE))


def fake_result(step: Step) -> StepResult:
    """Tokens for everybody, none of which ends anything."""
    if isinstance(step, Prefill):
        tokens = [[1] if chunk.last else [] for chunk in step.chunks]
    else:
        counts = DecodeBatch.from_sequences(step.sequences).num_tokens.tolist()
        tokens = [[1] * count for count in counts]
    return StepResult(tokens, [None] * len(tokens), 0.0, 0.02)


def time_next_step(load: HostLoad, turns: int) -> tuple[Times, Times, dict[str, int]]:
    """`next_step` and `apply` of a unit that stays as full as it is."""
    specs = specs_for(load)
    policy = create_policy(load.policy)
    unit = Scheduler(specs, pages_for(load), policy, prefix_cache=bool(load.cache))
    feed, names = Feed(), [spec.name for spec in specs]
    for index in range(load.running):
        unit.add(feed.request(names[index % len(names)], fresh=False))
    now, pending = 0.0, None
    made, applied = Times(), Times()
    # Until all run: those in line come after them.
    for _ in range(4 * load.running):
        pending, now, ended = _turn(unit, pending, now)
        for model in ended:
            unit.add(feed.request(model, fresh=False))
        if not any(state.waiting for state in unit.models.values()):
            break
    where = names if load.spread == "evenly" else names[:1]
    for index in range(load.waiting):
        unit.add(feed.request(where[index % len(where)]))
    for turn in range(turns + turns // 4):
        measured = turn >= turns // 4
        pending, now, ended = _turn(unit, pending, now, made if measured else None, applied)
        for model in ended:
            unit.add(feed.request(model))
    states = unit.models.values()
    return (
        made,
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
    made: Times | None = None,
    applied: Times | None = None,
) -> tuple[Step | None, float, list[str]]:
    """One turn; also says of which models requests have ended."""
    ended: list[str] = []
    began = time.perf_counter()
    step = unit.next_step(now)
    seconds = time.perf_counter() - began
    if made is not None:
        made.taken.append(seconds)
    if pending is not None:
        result = fake_result(pending)
        began = time.perf_counter()
        updates = unit.apply(pending, result, now)
        if applied is not None:
            applied.taken.append(time.perf_counter() - began)
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
    """Keeps Python's garbage collector out of `next_step`; a whole turn is timed with it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def next_step_row(load: HostLoad, turns: int) -> dict[str, Any]:
    """One row of the first tables."""
    with no_collector():
        made, applied, sizes = time_next_step(load, turns)
    return {
        **asdict(load),
        **sizes,
        **made.row(NEXT_STEP_LIMIT),
        "apply_us": float(np.median(applied.taken)) * 1e6,
    }


def main() -> None:
    """Runs the cases and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--turns", type=int, default=600, help="steps of each case")
    args = parser.parse_args()
    cases = [
        HostLoad(policy=policy, spread=spread, pages=pages)
        for policy in policy_names()
        for spread in ("evenly", "one")
        for pages in ("enough", "short")
    ]
    rows = [next_step_row(load, args.turns) for load in cases]
    growth = [
        {"varied": what, **next_step_row(replace(HostLoad(), **{what: value}), args.turns)}
        for what, values in GROWTH.items()
        for value in values
    ]
    turns = [
        {"batch": batch, "burst": burst, **time_turns(batch, burst, TURN_LIMIT)}
        for burst in (1, 8)
        for batch in (16, 64, 256, 512)
    ]
    if args.json:
        limits = {"next_step_us": NEXT_STEP_LIMIT * 1e6, "turn_us": TURN_LIMIT * 1e6}
        found = {"limits": limits, "next_step": rows, "growth": growth, "turn": turns}
        print_json(found | surroundings())
        return
    figures = ("median_us", "p99_us", "of_limit", "apply_us")
    show("next_step", ("policy", "spread", "pages", "running", "waiting", *figures), rows)
    columns = ("varied", "running", "waiting", "models", "cache", *figures)
    show("How next_step grows (adbs)", columns, growth)
    parts = ("next_step_us", "submit_us", "result_us", "apply_us", "streams_us", "readers_us")
    columns = ("batch", "burst", "median_us", "p99_us", "of_limit", *parts)
    show("Host work between two decode steps", columns, turns)


if __name__ == "__main__":
    main()
