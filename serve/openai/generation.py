"""Runs the streams of one call: all their deltas as they come, or their whole outputs.

Whatever ends a call early (the client leaves, one stream fails, the server stops),
`GenerationCall.cancel` is called for all its streams, so no request outlives its reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from muxjax.errors import EngineDead
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.steps import TokenLogprobs
from muxjax.serve.fleet_protocol import DeltaLike, FleetLike, StreamLike

T = TypeVar("T")


@dataclass
class GeneratedOutput:
    """All that one stream gave."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: DeltaLike) -> None:
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs or ())
        self.prompt_logprobs.extend(delta.prompt_logprobs or ())
        self.finish_reason = delta.finish_reason or self.finish_reason


@dataclass(frozen=True)
class GenerationCall:
    """The streams of one call: `choices` for each prompt, in the order of the answer."""

    streams: Sequence[StreamLike]
    choices: int

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counted once, however many outputs it has."""
        return sum(stream.num_prompt_tokens for stream in self.streams[:: self.choices])

    @property
    def num_cached_tokens(self) -> int:
        """Those of them that the prefix cache had, for the first output of each prompt."""
        return sum(stream.num_cached_tokens for stream in self.streams[:: self.choices])

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()

    async def deltas(self) -> AsyncIterator[tuple[int, DeltaLike]]:
        """Every delta of every stream, with the stream's index, as they come.

        Raises:
          EngineDead: a stream ended without having finished.
        """
        if len(self.streams) == 1:
            async for delta in _whole(self.streams[0]):
                yield 0, delta
            return
        queue: asyncio.Queue[tuple[int, DeltaLike] | asyncio.Task[None]] = asyncio.Queue()

        async def read(index: int, stream: StreamLike) -> None:
            async for delta in _whole(stream):
                queue.put_nowait((index, delta))

        readers = [
            asyncio.create_task(read(index, stream)) for index, stream in enumerate(self.streams)
        ]
        for reader in readers:
            reader.add_done_callback(queue.put_nowait)
        left = len(readers)
        try:
            while left:
                item = await queue.get()
                if isinstance(item, asyncio.Task):
                    item.result()
                    left -= 1
                else:
                    yield item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def outputs(self) -> list[GeneratedOutput]:
        """The whole output of every stream.

        Raises:
          EngineDead: a stream ended without having finished.
        """
        outputs = [GeneratedOutput() for _ in self.streams]
        async for index, delta in self.deltas():
            outputs[index].add(delta)
        if any(output.finish_reason == "abort" for output in outputs):
            raise EngineDead("the server is stopping; the request was cut")
        return outputs


async def _whole(stream: StreamLike) -> AsyncIterator[DeltaLike]:
    """The stream's deltas; an end other than by the model or a limit is an error."""
    async for delta in stream:
        # 'abort' is a cut by a server that stops; what was made so far is the caller's.
        if delta.finish_reason not in (None, "stop", "length", "abort"):
            raise EngineDead(f"the request was ended by the server ({delta.finish_reason})")
        yield delta


async def start(
    fleet: FleetLike, model: str, prompts: Sequence[list[int]], params: list[SamplingParams]
) -> GenerationCall:
    """Queues every prompt once for each of `params`, or none of them.

    Raises:
      InvalidRequest: a prompt or parameter that the model cannot serve.
      EngineDead: the engine has ended.
    """
    if all(one.grammar is None for one in params):
        return _start(fleet, model, prompts, params)
    # Grammars are compiled, which may take long, away from the loop that other streams run on.
    starting = asyncio.create_task(asyncio.to_thread(_start, fleet, model, prompts, params))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        starting.add_done_callback(_drop)
        raise


def _drop(starting: asyncio.Task[GenerationCall]) -> None:
    """Ends what was started for a call that is gone."""
    if not starting.cancelled() and starting.exception() is None:
        starting.result().cancel()


def _start(
    fleet: FleetLike, model: str, prompts: Sequence[list[int]], params: list[SamplingParams]
) -> GenerationCall:
    streams: list[StreamLike] = []
    try:
        for prompt in prompts:
            for choice in params:
                streams.append(fleet.stream(model, prompt, choice))
    except BaseException:
        GenerationCall(streams, len(params)).cancel()
        raise
    return GenerationCall(streams, len(params))


async def cancel_on_disconnect[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
      ClientDisconnect: the client left.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, even before its first event, `running` is cancelled."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], running: GenerationCall) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()
