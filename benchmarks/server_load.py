"""Cost of the HTTP server per token, and the rate at which it saturates.

    python benchmarks/server_load.py
    python benchmarks/server_load.py --streams 200 --tokens 100 --rates 2500,5000 --json

Only the device is simulated: an executor takes a given time for a step and always returns the same
token. 200 streams are requested at once. In alternation, a bare FastAPI application sends the same
number of events of the same size, each after an `asyncio.sleep`. Its cost is the minimum for a
server on FastAPI and uvicorn.

- At a given rate (`--rates`, tokens per second of all streams) an event is one token. The table
  shows the rate reached, and the processor time of server and client per token.
- `full`: steps take no time, so the server limits the rate. Events have one token, or eight
  (`decode_tokens: 8`).

Server and client share the machine, so the client's time is shown as well.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from fastapi import FastAPI
from rich.console import Console
from rich.table import Table
from starlette.requests import Request
from starlette.responses import StreamingResponse

PROMPT = list(range(40, 48))
_INSTANT = 1e-5
"""Seconds of a step that takes no time; not 0, since the scheduler divides by step times."""
LIMIT = 5000.0
"""Required tokens per second on two cores."""


@dataclass(frozen=True)
class ServerMeasurement:
    """One run: the kind of server, the load, and the result."""

    kind: str
    rate: float | None
    burst: int
    tokens: int
    seconds: float
    server_seconds: float
    client_seconds: float

    @property
    def reached(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def server_us(self) -> float:
        """Processor time of the server per token, in microseconds."""
        return 1e6 * self.server_seconds / self.tokens

    @property
    def client_us(self) -> float:
        """Processor time of the client per token, in microseconds."""
        return 1e6 * self.client_seconds / self.tokens


# The servers


class PacedExecutor:
    """Takes `seconds` for a decode step and always returns token 97."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._busy_until = 0.0

    def submit(self, step: Any) -> Any:
        """Queues a step behind the previous one."""
        from muxjax.scheduling.steps import Decode, StepResult

        if isinstance(step, Decode):
            tokens = [[97] * sequence.num_tokens for sequence in step.sequences]
            seconds = max(self._seconds * max(map(len, tokens)), _INSTANT)
        else:
            tokens = [[97] if chunk.last else [] for chunk in step.chunks]
            seconds = _INSTANT
        started = max(time.perf_counter(), self._busy_until)
        self._busy_until = started + seconds
        return StepResult(tokens, [None] * len(tokens), started, seconds)

    def result(self, handle: Any) -> Any:
        """Waits until the step has ended."""
        time.sleep(max(0.0, handle.started + handle.seconds - time.perf_counter()))
        return handle

    def add_model(self, name: str, model: Any) -> None:
        """Accepts any model."""

    def remove_model(self, name: str) -> None:
        """Does nothing: no state is kept for a model."""

    def close(self) -> None:
        """Does nothing: there is nothing to free."""


@contextlib.contextmanager
def real_app(streams: int, tokens: int, step: float, burst: int) -> Iterator[Any]:
    """MuxJAX's application on a fleet without a device."""
    from muxjax.config.fleet_file import load_fleet_config
    from muxjax.fleet import Fleet
    from muxjax.serve.app import create_app
    from muxjax.units.build_unit_spec import build_unit_spec
    from muxjax.units.local_unit import LocalUnit

    shape = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": len(PROMPT) + tokens + 8,
    }
    config = load_fleet_config(
        {
            "models": [{"name": "mock", "source": "config:llama", "config": shape}],
            "pool": {"memory": "1GB"},
            "engine": {"max_seqs": streams, "prefill_tokens": 1024, "decode_tokens": burst},
        }
    )
    plan = build_unit_spec(config, progress=False)
    unit = LocalUnit("0", plan, {}, executor_factory=lambda programs: PacedExecutor(step))
    with Fleet([unit]) as fleet:
        yield create_app(fleet)


def bare_app(tokens: int, step: float, burst: int) -> Any:
    """An application that only sends events."""
    app = FastAPI()
    event = {
        "id": "cmpl-" + "0" * 32,
        "object": "text_completion",
        "created": 1_800_000_000,
        "model": "mock",
        "system_fingerprint": "muxjax-0.0.0",
        "choices": [{"index": 0, "text": "a" * burst, "logprobs": None, "finish_reason": None}],
    }
    text = f"data: {json.dumps(event, separators=(',', ':'))}\n\n"

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        await request.json()

        async def events() -> AsyncIterator[str]:
            due = time.perf_counter()
            for _ in range(tokens // burst):
                due += step * burst
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                yield text
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def serve(kind: str, streams: int, tokens: int, step: float, burst: int) -> None:
    """Runs the server process: prints its port and serves until it is terminated."""
    import uvicorn

    from muxjax.serve.address import bind

    with contextlib.ExitStack() as stack, bind("127.0.0.1", 0) as bound:
        if kind == "muxjax":
            app = stack.enter_context(real_app(streams, tokens, step, burst))
        else:
            app = bare_app(tokens, step, burst)
        print(bound.getsockname()[1], flush=True)
        config = uvicorn.Config(app, log_level="error", access_log=False, server_header=False)
        uvicorn.Server(config).run(sockets=[bound])


# The client


class Reader(asyncio.Protocol):
    """Sends one request and counts the events of the response, with as little work as possible."""

    def __init__(self, request: bytes, ended: asyncio.Event) -> None:
        self._request = request
        self._ended = ended
        self._tail = b""
        self.events = 0
        self.ok = False

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        # An event may be split between two reads; its first bytes are counted with the second.
        data = self._tail + data
        self.events += data.count(b"data: {")
        self._tail = data[-6:]
        if b"data: [DONE]" in data:
            self.ok = True
            self._ended.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._ended.set()


async def send_streams(port: int, streams: int, tokens: int) -> tuple[float, int]:
    """Returns the seconds until all streams have ended, and the number of events."""
    body = json.dumps(
        {
            "model": "mock",
            "prompt": PROMPT,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    loop = asyncio.get_running_loop()
    ended = [asyncio.Event() for _ in range(streams)]
    began = time.perf_counter()
    connections = [
        await loop.create_connection(partial(Reader, request, event), "127.0.0.1", port)
        for event in ended
    ]
    for event in ended:
        await event.wait()
    seconds = time.perf_counter() - began
    for transport, _ in connections:
        transport.close()
    readers = [reader for _, reader in connections]
    if not all(reader.ok for reader in readers):
        raise SystemExit("a stream ended early; see the server's log")
    return seconds, sum(reader.events for reader in readers)


def measure(
    kind: str, streams: int, tokens: int, rate: float | None, burst: int, timeout: float
) -> ServerMeasurement:
    """Starts a server and runs the load twice: to warm up, and to measure."""
    import uvloop

    step = 0.0 if rate is None else streams / rate
    command = [sys.executable, str(Path(__file__)), "--serve", kind, "--streams", str(streams)]
    command += ["--tokens", str(tokens), "--step", str(step), "--burst", str(burst)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            port = int(process.stdout.readline())
            wait_for(port)
            uvloop.run(asyncio.wait_for(send_streams(port, min(streams, 20), tokens), timeout))
            server, client = psutil.Process(process.pid), psutil.Process()
            before = _cpu(server), _cpu(client)
            seconds, events = uvloop.run(
                asyncio.wait_for(send_streams(port, streams, tokens), timeout)
            )
            used = _cpu(server) - before[0], _cpu(client) - before[1]
        finally:
            process.kill()
    generated = streams * tokens
    if burst == 1 and events < generated:
        raise SystemExit(f"{generated} tokens in {events} events: some events had several tokens")
    return ServerMeasurement(kind, rate, burst, generated, seconds, *used)


def wait_for(port: int) -> None:
    """Waits until the server answers."""
    import socket

    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit("the server does not answer")


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    """Measures all loads and prints the result."""
    parser = argparse.ArgumentParser(description="Measure the server without a device.")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=100, help="output tokens of each stream")
    parser.add_argument("--rates", default="2500,5000", help="tokens per second of all streams")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; medians are shown")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--serve", choices=("muxjax", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--step", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--burst", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.streams, arguments.tokens, arguments.step, arguments.burst)
        return
    if arguments.tokens % 8:
        parser.error("--tokens must be a multiple of 8")
    cases: list[tuple[float | None, int]] = [(float(r), 1) for r in arguments.rates.split(",")]
    cases += [(None, 1), (None, 8)]
    runs: dict[tuple[float | None, int, str], list[ServerMeasurement]] = {}
    for number in range(arguments.rounds):
        for rate, burst in cases:
            for kind in ("muxjax", "bare"):
                result = measure(
                    kind, arguments.streams, arguments.tokens, rate, burst, arguments.timeout
                )
                runs.setdefault((rate, burst, kind), []).append(result)
                print(
                    f"round {number + 1}: {kind} {rate or 'full'} x{burst}: "
                    f"{result.reached:,.0f} tokens/s, {result.server_us:.0f} us",
                    file=sys.stderr,
                )
    report(runs, as_json=arguments.json)


def report(
    runs: dict[tuple[float | None, int, str], list[ServerMeasurement]], *, as_json: bool
) -> None:
    """Prints medians, and the ratios to the bare application and to the limit."""

    def mid(rate: float | None, burst: int, kind: str, name: str) -> float:
        return median(getattr(run, name) for run in runs[rate, burst, kind])

    rows = []
    for rate, burst in dict.fromkeys((rate, burst) for rate, burst, _ in runs):
        muxjax, bare = (mid(rate, burst, kind, "server_us") for kind in ("muxjax", "bare"))
        rows.append(
            {
                "asked": rate,
                "tokens_per_event": burst,
                "reached": mid(rate, burst, "muxjax", "reached"),
                "reached_bare": mid(rate, burst, "bare", "reached"),
                "server_us": muxjax,
                "server_us_bare": bare,
                "overhead_us": muxjax - bare,
                "client_us": mid(rate, burst, "muxjax", "client_us"),
                "ratio_to_limit": mid(rate, burst, "muxjax", "reached") / LIMIT,
            }
        )
    if as_json:
        all_runs = [asdict(run) for repeats in runs.values() for run in repeats]
        print(json.dumps({"limit": LIMIT, "rows": rows, "runs": all_runs}, indent=2))
        return
    table = Table(title="tokens/s, and microseconds of processor time per token", box=None)
    for name in (
        "rate",
        "per event",
        "reached",
        "bare",
        "server us",
        "bare us",
        "overhead us",
        "client us",
        f"of {LIMIT:,.0f}/s",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        rate = row["asked"]
        table.add_row(
            "full" if rate is None else f"{rate:,.0f}",
            f"{row['tokens_per_event']}",
            f"{row['reached']:,.0f}",
            f"{row['reached_bare']:,.0f}",
            f"{row['server_us']:.0f}",
            f"{row['server_us_bare']:.0f}",
            f"{row['overhead_us']:.0f}",
            f"{row['client_us']:.0f}",
            f"{row['ratio_to_limit']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
