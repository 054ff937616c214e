"""Sends requests at their due times and collects the results; Ctrl-C ends the run early."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass

from muxjax.bench.http.client import RequestInput, RequestResult, Server, send_request
from muxjax.errors import BenchError


@dataclass
class LoadResult:
    """A finished run.

    Attributes:
      results: in the order of the inputs, without requests that an interrupt left unfinished.
      duration: seconds from the start to the last result.
      interrupted: number of requests that an interrupt left unfinished.
    """

    results: list[RequestResult]
    duration: float
    interrupted: int = 0


def run_load(
    servers: Server | Mapping[str, Server],
    inputs: Sequence[RequestInput],
    *,
    max_concurrency: int | None = None,
    on_result: Callable[[RequestResult], None] | None = None,
) -> LoadResult:
    """Sends all requests at their due times and waits for them.

    Ctrl-C ends the run: running requests are cancelled, and finished ones are returned.

    Args:
      servers: one for all models, or one for each model.
      inputs: the requests, in any order; each is sent at its `arrival`.
      max_concurrency: maximum number of running requests over all models; None: no limit.
      on_result: called with each result.

    Raises:
      BenchError: a model without a server, or no requests.
    """
    return asyncio.run(
        send_all(servers, inputs, max_concurrency=max_concurrency, on_result=on_result)
    )


async def send_all(
    servers: Server | Mapping[str, Server],
    inputs: Sequence[RequestInput],
    *,
    max_concurrency: int | None = None,
    on_result: Callable[[RequestResult], None] | None = None,
) -> LoadResult:
    """The same as `run_load` in a running event loop; cancellation acts as Ctrl-C does there."""
    if not inputs:
        raise BenchError("there are no requests to send")
    if max_concurrency is not None and max_concurrency < 1:
        raise BenchError(f"--max-concurrency must be at least 1, not {max_concurrency}")
    by_model = _servers_by_model(servers, inputs)
    gate = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    finished: dict[int, RequestResult] = {}
    async with AsyncExitStack() as stack:
        sessions = {
            id(server): await stack.enter_async_context(server.session())
            for server in {id(server): server for server in by_model.values()}.values()
        }
        start = time.perf_counter()

        async def send_when_due(index: int, request: RequestInput) -> None:
            await asyncio.sleep(request.arrival - (time.perf_counter() - start))
            server = by_model[request.model]
            async with gate:
                result = await send_request(sessions[id(server)], server, request, start)
            finished[index] = result
            if on_result is not None:
                on_result(result)

        order = sorted(range(len(inputs)), key=lambda index: inputs[index].arrival)
        tasks = [asyncio.create_task(send_when_due(index, inputs[index])) for index in order]
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            # Ctrl-C: finished requests are kept.
            current = asyncio.current_task()
            if current is not None:
                current.uncancel()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        duration = time.perf_counter() - start
    results = [finished[index] for index in sorted(finished)]
    return LoadResult(results, duration, len(inputs) - len(results))


def _servers_by_model(
    servers: Server | Mapping[str, Server], inputs: Sequence[RequestInput]
) -> dict[str, Server]:
    names = dict.fromkeys(request.model for request in inputs)
    if isinstance(servers, Server):
        return dict.fromkeys(names, servers)
    missing = [name for name in names if name not in servers]
    if missing:
        raise BenchError(f"no server for {missing[0]}; there are servers for {', '.join(servers)}")
    return {name: servers[name] for name in names}
