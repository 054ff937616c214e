"""Time to first token with and without a cached prefix.

    python benchmarks/prefix_cache.py [--json] [--model demo:smollm2-135m] [--tokens 512]

Prompts have a shared prefix, such as a system prompt, and a few unique tokens. Each round sends
a request with a new prefix (cold) and then one with the same prefix (warm), so that a change of the
machine's speed affects both. The table shows the ratio of the medians, for single
and for concurrent requests. `computed` is the ratio if the time were proportional to the number of
prefilled tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from statistics import median
from typing import Any

import numpy as np

from muxjax import Fleet, SamplingParams
from muxjax.bench.machine import describe_machine
from muxjax.bench.script_output import print_json, print_table

UNIQUE_TOKENS = 16
MAX_TOKENS = 2
PARAMS = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)


async def first_tokens(fleet: Fleet, prompts: list[list[int]]) -> tuple[float, int]:
    """Returns the mean TTFT of concurrent prompts in seconds, and the number of cached tokens."""

    async def first_token(prompt: list[int]) -> tuple[float, int]:
        began = time.perf_counter()
        stream = fleet.stream("model", prompt, PARAMS)
        first = 0.0
        async for _ in stream:
            first = first or time.perf_counter() - began
        return first, stream.num_cached_tokens

    results = await asyncio.gather(*map(first_token, prompts))
    return float(np.mean([seconds for seconds, _ in results])), sum(hits for _, hits in results)


def measure(
    fleet: Fleet, rng: np.random.Generator, shared: int, at_once: int, rounds: int
) -> dict[str, Any]:
    """Measures prompts with `shared` common tokens, cold and warm in each round; returns a row."""
    vocab = fleet.models["model"].config.vocab_size

    def prompts(prefix: list[int], count: int) -> list[list[int]]:
        suffixes = rng.integers(vocab, size=(count, UNIQUE_TOKENS)).tolist()
        return [prefix + suffix for suffix in suffixes]

    cold, warm, hits = [], [], []
    for _ in range(rounds):
        # Every cold prompt has a different prefix; the warm ones have the prefix of the first.
        prefixes = rng.integers(vocab, size=(at_once, shared)).tolist()
        cold_prompts = [prompts(prefix, 1)[0] for prefix in prefixes]
        seconds, cached = asyncio.run(first_tokens(fleet, cold_prompts))
        assert cached == 0
        cold.append(seconds)
        seconds, cached = asyncio.run(first_tokens(fleet, prompts(prefixes[0], at_once)))
        warm.append(seconds)
        hits.append(cached / at_once)
    length = shared + UNIQUE_TOKENS
    return {
        "shared": shared,
        "at_once": at_once,
        "without_ms": 1e3 * median(cold),
        "with_ms": 1e3 * median(warm),
        "ratio": median(cold) / median(warm),
        "computed": length / (length - median(hits)),
        "cached_tokens": median(hits),
    }


def main() -> None:
    """Runs the cases and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--model", default="demo:smollm2-135m", help="a source")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512], help="shared tokens")
    parser.add_argument(
        "--at-once", type=int, nargs="+", default=[1, 4], help="concurrent requests"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    longest = max(args.tokens) + UNIQUE_TOKENS + MAX_TOKENS
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
        print_json({"model": args.model, "rows": rows, **describe_machine()})
        return
    columns = ("shared", "at_once", "without_ms", "with_ms", "ratio", "computed", "cached_tokens")
    print_table("Time to the first token", columns, rows)


if __name__ == "__main__":
    main()
