"""Decode speed relative to the memory bandwidth, by precision and batch size.

    python benchmarks/decode.py
    python benchmarks/decode.py --model demo:gemma3-270m --precision int8 --batch 1 --batch 8

A decode step reads every weight once, so at small batches `bytes of weights / read bandwidth` is a
lower bound of its time. `engine` is the rate of requests through `Fleet`, and `bare` the rate of
the compiled step in a loop without a scheduler. The read bandwidth is measured repeatedly in the
same run, with a sum over 512 MiB. `ratio` is the lower bound over the measured time. It ignores
attention, which reads few keys and values at these short contexts.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import jax

from muxjax import Fleet, SamplingParams
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
)
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.scheduling.steps import Decode, DecodeSequence, Prefill, PrefillChunk

PROMPT = 16
"""Tokens of each prompt."""


def main() -> None:
    """Measures all precisions and prints the result."""
    parser = argparse.ArgumentParser(description="Measure decode speed.")
    parser.add_argument("--model", default="demo:smollm2-135m", help="a source, as in a fleet file")
    parser.add_argument(
        "--precision", action="append", choices=list(PRECISIONS), help="default: all"
    )
    parser.add_argument("--batch", action="append", type=int, help="default: 1, 2, 4, 8, 16")
    parser.add_argument(
        "--tokens", type=int, default=64, help="output tokens of each request, at least 24"
    )
    parser.add_argument("--runs", type=int, default=3, help="number of runs; medians are shown")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    batches = arguments.batch or [1, 2, 4, 8, 16]

    rates = DeviceRates()
    rows: list[dict[str, Any]] = []
    for precision in arguments.precision or PRECISIONS:
        loaded = load(arguments.model, precision, max_seqs=max(batches))
        token_rates: dict[tuple[str, int], list[float]] = {}
        with loaded.executor() as executor, loaded.fleet() as fleet:
            for run in range(arguments.runs):
                for batch in batches:
                    rates.measure()
                    rate = bare_rate(loaded, executor, batch, arguments.tokens)
                    token_rates.setdefault(("bare", batch), []).append(rate)
                    rate = engine_rate(loaded, fleet, batch, arguments.tokens, seed=run)
                    token_rates.setdefault(("engine", batch), []).append(rate)
            rates.measure()
        for (kind, batch), values in token_rates.items():
            rows.append(
                {
                    "precision": precision,
                    "kind": kind,
                    "batch": batch,
                    "tokens/s": median(values),
                    "ms/step": 1e3 * batch / median(values),
                    "GB/s": median(values) / batch * step_bytes(loaded.model) / 1e9,
                }
            )
    for row in rows:
        row["ratio"] = row["GB/s"] * 1e9 / rates.bandwidth
    report(arguments.model, rows, rates, as_json=arguments.json)


def engine_rate(loaded: CompiledModel, fleet: Fleet, batch: int, tokens: int, seed: int) -> float:
    """Tokens per second of requests through the engine while all of them decode."""
    prompts = random_prompts(loaded.model, batch, PROMPT, seed)
    return run_requests(fleet, prompts, tokens).steady_rate


def bare_rate(loaded: CompiledModel, executor: JaxExecutor, batch: int, tokens: int) -> float:
    """Tokens per second of the compiled decode step in a loop."""
    name, layers = loaded.model.name, loaded.model.config.num_layers
    per_block = loaded.model.layout.tokens_per_page
    per_step = loaded.plan.model_specs[name].functions.max_decode_tokens
    blocks = -(-(PROMPT + 1 + tokens) // per_block)
    first = loaded.plan.dummy_pages
    params = SamplingParams(max_tokens=tokens + 1, temperature=0)
    tables = [
        [first + (slot * blocks + block) * layers for block in range(blocks)]
        for slot in range(batch)
    ]
    for slot, prompt in enumerate(random_prompts(loaded.model, batch, PROMPT, seed=0)):
        chunk = PrefillChunk(
            request_id=slot,
            slot=slot,
            tokens=tuple(prompt),
            start=0,
            num_prompt_tokens=PROMPT,
            blocks=tables[slot],
            num_blocks=blocks,
            sampling=params,
            max_new_tokens=tokens + 1,
        )
        executor.result(executor.submit(Prefill(name, [chunk])))
    sequences = [
        DecodeSequence(slot, slot, tables[slot], blocks, per_step) for slot in range(batch)
    ]
    step = Decode(name, sequences, per_step)
    handles = [executor.submit(step) for _ in range(tokens // per_step)]
    results = [executor.result(handle) for handle in handles]
    counted = results[1:]  # the first also waits for earlier work
    generated = sum(len(tokens) for result in counted for tokens in result.tokens)
    return generated / sum(result.seconds for result in counted)


def report(model: str, rows: list[dict[str, Any]], rates: DeviceRates, *, as_json: bool) -> None:
    """Prints the result."""
    bandwidth = rates.bandwidth / 1e9
    notes = {"JAX": jax.__version__, "read bandwidth in GB/s": bandwidth}
    if as_json:
        print_json({"model": model, **describe_machine(), "read_GB/s": bandwidth, "rows": rows})
        return
    columns = ("precision", "kind", "batch", "tokens/s", "ms/step", "GB/s", "ratio")
    print_table(f"decode, {model}", columns, rows, **notes)


if __name__ == "__main__":
    main()
