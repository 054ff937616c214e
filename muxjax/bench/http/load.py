"""Sends requests when they are due, and keeps what came back; an interrupt ends it early."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass

from muxjax.bench.http.client import RequestInput, RequestResult, Server, perform
from muxjax.errors import BenchError


@dataclass
class LoadResult:
    """A finished run.

    Attributes:
      outcomes: in the order of the requests; those that were not finished at an interrupt are left
        out.
      duration: seconds from the start to the last outcome.
      interrupted: how many requests were left out.
    """

    outcomes: list[RequestResult]
    duration: float
    interrupted: int = 0


def run_load(
    servers: Server | Mapping[str, Server],
    asks: Sequence[RequestInput],
    *,
    max_concurrency: int | None = None,
    done: Callable[[RequestResult], None] | None = None,
) -> LoadResult:
    """Sends all requests, each when it is due, and waits for them.

    Ctrl-C ends the run: requests under way are dropped, and what is finished is returned.

    Args:
      servers: one for all, or one for each model.
      asks: the requests; their arrivals decide the order.
      max_concurrency: requests under way at most, over all models; None: any number.
      done: called with each outcome.

    Raises:
      BenchError: a model without a server, or no requests.
    """
    return asyncio.run(send_all(servers, asks, max_concurrency=max_concurrency, done=done))


async def send_all(
    servers: Server | Mapping[str, Server],
    asks: Sequence[RequestInput],
    *,
    max_concurrency: int | None = None,
    done: Callable[[RequestResult], None] | None = None,
) -> LoadResult:
    """As `run_load`, in a running event loop; cancelling it takes the place of Ctrl-C."""
    if not asks:
        raise BenchError("there are no requests to send")
    if max_concurrency is not None and max_concurrency < 1:
        raise BenchError(f"--max-concurrency must be at least 1, not {max_concurrency}")
    by_model = _servers(servers, asks)
    gate = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    finished: dict[int, RequestResult] = {}
    async with AsyncExitStack() as stack:
        clients = {
            id(server): await stack.enter_async_context(server.client())
            for server in {id(server): server for server in by_model.values()}.values()
        }
        start = time.perf_counter()

        async def one(index: int, ask: RequestInput) -> None:
            await asyncio.sleep(ask.arrival - (time.perf_counter() - start))
            server = by_model[ask.model]
            async with gate:
                outcome = await perform(clients[id(server)], server, ask, start)
            finished[index] = outcome
            if done is not None:
                done(outcome)

        order = sorted(range(len(asks)), key=lambda index: asks[index].arrival)
        tasks = [asyncio.create_task(one(index, asks[index])) for index in order]
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            # Ctrl-C: what is finished is kept.
            current = asyncio.current_task()
            if current is not None:
                current.uncancel()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        duration = time.perf_counter() - start
    outcomes = [finished[index] for index in sorted(finished)]
    return LoadResult(outcomes, duration, len(asks) - len(outcomes))


def _servers(
    servers: Server | Mapping[str, Server], asks: Sequence[RequestInput]
) -> dict[str, Server]:
    names = dict.fromkeys(ask.model for ask in asks)
    if isinstance(servers, Server):
        return dict.fromkeys(names, servers)
    missing = [name for name in names if name not in servers]
    if missing:
        raise BenchError(f"no server for {missing[0]}; there are servers for {', '.join(servers)}")
    return {name: servers[name] for name in names}
