"""Compares MuxJAX with other servers on one machine, for two models of different popularity.

    python benchmarks/peers.py --ours int8=fleet.yaml --peer vllm=http://127.0.0.1:8001,http://127.0.0.1:8002
    python benchmarks/peers.py --ours-url float32=http://127.0.0.1:8000 --peer llama=http://127.0.0.1:8003

Servers must have OpenAI's `/v1/completions` and accept token ids. A peer with one model per process
has one address for each model, in the order of `--model`. A peer with a single address serves all
models. For `--ours NAME=FLEET`, `muxjax serve` is started, and stopped at the end.

In a round, all requests are sent at once to one server after the other. A change of the machine's
speed thus affects all servers. The table shows the total output tokens per second (median over the
rounds), and the ratio to the best peer. The script fails if a response lacks tokens. README.md
describes how to start vLLM's CPU build and llama.cpp.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from muxjax.bench.http.client import RequestInput, Server
from muxjax.bench.http.load import LoadResult, run_load
from muxjax.errors import BenchError

LARGEST_ID = 40_000
"""Token ids of prompts are below this; all vocabularies of the two models are larger."""
Servers = Mapping[str, Server]
"""The server of each model."""


def main() -> None:
    """Measures all servers and prints the result."""
    arguments = _arguments()
    counts = [int(count) for count in arguments.requests.split(",")]
    models = arguments.model or ["chat", "base"]
    if len(counts) != len(models):
        sys.exit(f"--requests has {len(counts)} numbers for {len(models)} models")
    with ExitStack() as started:
        ours = {}
        for name, fleet in map(_pair, arguments.ours):
            url = started.enter_context(our_server(fleet, arguments.patience))
            ours[name] = _servers(name, url, models)
        ours |= {name: _servers(name, url, models) for name, url in map(_pair, arguments.ours_url)}
        peers = {name: _servers(name, urls, models) for name, urls in map(_pair, arguments.peer)}
        servers = {**ours, **peers}
        if not servers or len(servers) < len(ours) + len(peers):
            sys.exit("give --ours, --ours-url or --peer, each server with a different name")
        try:
            rounds = measure(servers, dict(zip(models, counts, strict=True)), arguments)
        except BenchError as error:
            sys.exit(str(error))
    rows = rows_of(rounds, list(peers))
    if arguments.json:
        import json

        settings = {name: getattr(arguments, name) for name in ("requests", "prompt", "output")}
        print(json.dumps({**settings, "models": models, "rows": rows}, indent=2))
        return
    show(rows, f"{arguments.requests} requests, {arguments.prompt} in, {arguments.output} out")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare servers.")
    parser.add_argument(
        "--ours", action="append", default=[], metavar="NAME=FLEET", help="a fleet file to serve"
    )
    parser.add_argument(
        "--ours-url",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a running server",
    )
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=URL[,URL...]", help="another server"
    )
    parser.add_argument(
        "--model", action="append", help="model name on the servers; default: chat, base"
    )
    parser.add_argument("--requests", default="13,3", help="number of requests for each model")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="output tokens of each request")
    parser.add_argument(
        "--rounds", type=int, default=5, help="measured rounds, after one warm-up round"
    )
    parser.add_argument("--patience", type=float, default=600, help="seconds for a server to start")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        sys.exit(f"{text!r} is not NAME=VALUE")
    return name, value


def _servers(name: str, urls: str, models: list[str]) -> Servers:
    addresses = urls.split(",")
    if len(addresses) not in (1, len(models)):
        sys.exit(f"{name} has {len(addresses)} addresses for {len(models)} models: give one or all")
    body = {"temperature": 0, "ignore_eos": True}
    try:
        servers = [Server(url, body=body) for url in addresses]
    except BenchError as error:
        sys.exit(str(error))
    return dict(zip(models, servers * (len(models) // len(servers)), strict=True))


@contextmanager
def our_server(fleet: str, patience: float) -> Iterator[str]:
    """Runs `muxjax serve` on a free local port; yields its address when it is ready."""
    command = [sys.executable, "-m", "muxjax", "serve", fleet, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield _address(process, patience)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[str], patience: float) -> str:
    import threading

    watchdog = threading.Timer(patience, process.terminate)
    watchdog.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"http://\S+", line):
                return match[0]
    finally:
        watchdog.cancel()
    sys.exit(f"`{' '.join(map(str, process.args))}` ended before it was ready")  # type: ignore[arg-type]


def measure(
    all_servers: Mapping[str, Servers], counts: Mapping[str, int], arguments: argparse.Namespace
) -> dict[str, list[LoadResult]]:
    """Runs all rounds; returns them by server.

    Raises:
      BenchError: a request failed or its response lacks tokens.
    """
    rounds: dict[str, list[LoadResult]] = {name: [] for name in all_servers}
    for number in range(arguments.rounds + 1):
        for name, servers in all_servers.items():
            inputs = build_inputs(counts, arguments.prompt, arguments.output, seed=number)
            load = run_load(servers, inputs)
            check(name, load)
            if number > 0:  # the first round warms up
                rounds[name].append(load)
                print(f"round {number}, {name}: {rate(load):.0f} tokens/s", file=sys.stderr)
    return rounds


def build_inputs(
    counts: Mapping[str, int], prompt: int, output: int, seed: int
) -> list[RequestInput]:
    """Builds the requests of a round, all due at once, with new random prompts."""
    ids = random.Random(seed)
    return [
        RequestInput(
            model, tuple(ids.randrange(3, LARGEST_ID) for _ in range(prompt)), prompt, output
        )
        for model, count in counts.items()
        for _ in range(count)
    ]


def check(name: str, load: LoadResult) -> None:
    """Checks that all responses are complete, since rates are not comparable otherwise.

    Raises:
      BenchError: a request failed or its response lacks tokens.
    """
    if load.interrupted:
        raise BenchError("interrupted")
    for result in load.results:
        if not result.success:
            raise BenchError(f"{name}, model {result.request.model}: {result.error}")
        if result.output_tokens != result.request.output_tokens:
            raise BenchError(
                f"{name}, model {result.request.model}: {result.output_tokens} tokens instead "
                f"of {result.request.output_tokens}; does the server support `ignore_eos`?"
            )


def rate(load: LoadResult, model: str | None = None) -> float:
    """Output tokens per second until the last response, of all models or of one."""
    chosen = [o for o in load.results if model is None or o.request.model == model]
    end = max(result.end or 0.0 for result in chosen)
    return sum(result.output_tokens for result in chosen) / end


def rows_of(rounds: Mapping[str, list[LoadResult]], peers: list[str]) -> list[dict[str, Any]]:
    """Returns a row for each server; `ratio` is relative to the peer with the best median."""
    medians = {name: median(map(rate, loads)) for name, loads in rounds.items()}
    best = max((medians[name] for name in peers), default=None)
    rows = []
    for name, loads in rounds.items():
        rates = [rate(load) for load in loads]
        models = dict.fromkeys(o.request.model for o in loads[0].results)
        first = [o.ttft for load in loads for o in load.results]
        rows.append(
            {
                "server": name,
                "tokens/s": medians[name],
                "lowest": min(rates),
                "highest": max(rates),
                "median_ttft_s": median(first),
                "models": {m: median(rate(load, m) for load in loads) for m in models},
                "ratio": None if best is None else medians[name] / best,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Prints the rows as a table."""
    table = Table(title=title)
    columns = ("server", "tokens/s", "lowest", "highest", "by model", "TTFT s", "to best peer")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        by_model = ", ".join(f"{name} {value:.0f}" for name, value in row["models"].items())
        table.add_row(
            row["server"],
            *(f"{row[key]:.0f}" for key in ("tokens/s", "lowest", "highest")),
            by_model,
            f"{row['median_ttft_s']:.2f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        )
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    main()
