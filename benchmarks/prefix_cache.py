"""What the prefix cache saves: time to the first token of prompts that begin alike.

    python benchmarks/prefix_cache.py [--json] [--model demo:smollm2-135m] [--tokens 512]

Prompts are a beginning that all share, as a system prompt is, and a few tokens of their own. A
request with the cache empty is followed by one that finds the beginning there, over and over, with
a new beginning each time, so that a change of the machine's speed meets both alike. The ratio of
the medians is shown, for one request at a time and for as many as are given at once, beside what
the shared part of the prompt would predict if nothing but prefill took time.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from statistics import median
from typing import Any

import numpy as np
from _common import print_json, show, surroundings

from muxjax import Fleet, SamplingParams

OWN_TOKENS = 16
MAX_TOKENS = 2
PARAMS = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)


async def first_tokens(fleet: Fleet, prompts: list[list[int]]) -> tuple[float, int]:
    """Mean seconds to the first token of prompts that come at once; tokens that were found."""

    async def one(prompt: list[int]) -> tuple[float, int]:
        began = time.perf_counter()
        stream = fleet.stream("model", prompt, PARAMS)
        first = 0.0
        async for _ in stream:
            first = first or time.perf_counter() - began
        return first, stream.num_cached_tokens

    found = await asyncio.gather(*map(one, prompts))
    return float(np.mean([seconds for seconds, _ in found])), sum(cached for _, cached in found)


def measure(
    fleet: Fleet, rng: np.random.Generator, shared: int, at_once: int, rounds: int
) -> dict[str, Any]:
    """One row: requests whose first `shared` tokens are alike, cold, then warm, round by round."""
    vocab = fleet.models["model"].config.vocab_size

    def prompts(beginning: list[int], count: int) -> list[list[int]]:
        own = rng.integers(vocab, size=(count, OWN_TOKENS)).tolist()
        return [beginning + tokens for tokens in own]

    cold, warm, hits = [], [], []
    for _ in range(rounds):
        # All cold ones begin unlike each other; the warm ones like the first of them.
        beginnings = rng.integers(vocab, size=(at_once, shared)).tolist()
        asked = [prompts(beginning, 1)[0] for beginning in beginnings]
        seconds, cached = asyncio.run(first_tokens(fleet, asked))
        assert cached == 0
        cold.append(seconds)
        seconds, cached = asyncio.run(first_tokens(fleet, prompts(beginnings[0], at_once)))
        warm.append(seconds)
        hits.append(cached / at_once)
    length = shared + OWN_TOKENS
    return {
        "shared": shared,
        "at_once": at_once,
        "without_ms": 1e3 * median(cold),
        "with_ms": 1e3 * median(warm),
        "ratio": median(cold) / median(warm),
        "computed": length / (length - median(hits)),
        "found": median(hits),
    }


def main() -> None:
    """Runs the cases and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--model", default="demo:smollm2-135m", help="a source")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512], help="shared tokens")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4], help="requests at once")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    longest = max(args.tokens) + OWN_TOKENS + MAX_TOKENS
    config = {
        "models": [{"name": "model", "source": args.model, "max_model_len": longest}],
        "engine": {"max_seqs": max(args.at_once)},
    }
    with Fleet.load(config) as fleet:
        rng = np.random.default_rng(0)
        measure(fleet, rng, min(args.tokens), 1, 1)  # the first steps of a process are slow
        rows = [
            measure(fleet, rng, shared, at_once, args.rounds)
            for shared in args.tokens
            for at_once in args.at_once
        ]
    if args.json:
        print_json({"model": args.model, "rows": rows, **surroundings()})
        return
    columns = ("shared", "at_once", "without_ms", "with_ms", "ratio", "computed", "found")
    show("Time to the first token", columns, rows)


if __name__ == "__main__":
    main()
