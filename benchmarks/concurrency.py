"""Throughput of concurrent requests, prompts included, and time to first token.

    python benchmarks/concurrency.py
    python benchmarks/concurrency.py --requests 8 --prompt 128 --output 64 --precision int8

All requests are submitted at once. `output tokens/s` is the number of generated tokens divided by
the time from submission to the last token. `roofline` is the maximum rate for the device
rates of the same run: each decode step reads the weights once at the bandwidth of a plain sum, and
prompts run at the rate of one large matrix product of the same precision.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import jax

from muxjax.bench.device_rates import DeviceRates
from muxjax.bench.machine import describe_machine
from muxjax.bench.script_output import print_json, print_table
from muxjax.bench.single_model import (
    PRECISIONS,
    CompiledModel,
    load,
    random_prompts,
    run_requests,
    step_bytes,
    token_operations,
)

FIRST_TOKEN_PROMPT = 20


def main() -> None:
    """Measures all precisions and prints the result."""
    parser = argparse.ArgumentParser(description="Measure concurrent requests.")
    parser.add_argument("--model", default="demo:smollm2-135m", help="a source, as in a fleet file")
    parser.add_argument(
        "--precision", action="append", choices=list(PRECISIONS), help="default: all"
    )
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="output tokens of each request")
    parser.add_argument("--runs", type=int, default=5, help="number of runs; medians are shown")
    parser.add_argument("--policy", default="adbs", help="as in a fleet file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()

    rates = DeviceRates()
    rows = [measure(precision, rates, arguments) for precision in arguments.precision or PRECISIONS]
    bandwidth = rates.bandwidth / 1e9
    if arguments.json:
        print_json(
            {"model": arguments.model, **describe_machine(), "read_GB/s": bandwidth, "rows": rows}
        )
        return
    title = (
        f"{arguments.model}: {arguments.requests} requests, "
        f"{arguments.prompt} tokens in, {arguments.output} out"
    )
    notes = {"JAX": jax.__version__, "read bandwidth in GB/s": bandwidth}
    print_table(title, tuple(rows[0]), rows, **notes)


def measure(precision: str, rates: DeviceRates, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one precision; returns a row of the table."""
    loaded = load(
        arguments.model,
        precision,
        max_seqs=arguments.requests,
        max_model_len=max(256, arguments.prompt + arguments.output),
        policy=arguments.policy,
    )
    runs, firsts = [], []
    with loaded.fleet() as fleet:
        for seed in range(arguments.runs + 1):
            rates.measure(precision)
            prompts = random_prompts(loaded.model, arguments.requests, arguments.prompt, seed)
            run = run_requests(fleet, prompts, arguments.output)
            (prompt,) = random_prompts(loaded.model, 1, FIRST_TOKEN_PROMPT, seed)
            first = run_requests(fleet, [prompt], 2).first_token
            if seed > 0:  # the first run warms up
                runs.append(run)
                firsts.append(first)
    seconds = median(run.seconds for run in runs)
    tokens = arguments.requests * arguments.output
    roofline = roofline_seconds(loaded, rates, arguments)
    return {
        "precision": precision,
        "output_tokens/s": tokens / seconds,
        "lowest": tokens / max(run.seconds for run in runs),
        "highest": tokens / min(run.seconds for run in runs),
        "all_tokens/s": (tokens + arguments.requests * arguments.prompt) / seconds,
        "first_token_ms": 1e3 * median(firsts),
        "GFLOP/s": rates.matmul_rate(precision) / 1e9,
        "roofline": tokens / roofline,
        "ratio": roofline / seconds,
    }


def roofline_seconds(
    loaded: CompiledModel, rates: DeviceRates, arguments: argparse.Namespace
) -> float:
    """Minimum time of the requests at the measured rates, in seconds."""
    # The first token of each request comes from its prefill.
    decode = (arguments.output - 1) * step_bytes(loaded.model) / rates.bandwidth
    tokens = arguments.requests * arguments.prompt
    prefill = tokens * token_operations(loaded.model) / rates.matmul_rate(loaded.model.precision)
    return decode + prefill


if __name__ == "__main__":
    main()
