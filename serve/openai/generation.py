"""Generation for one HTTP call: opens its streams, reads them, and cancels them at the end.

`GenerationCall.cancel` runs however a call ends, also if the client disconnects, a stream fails or
the server shuts down. No request therefore outlives its reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from muxjax.errors import EngineDead
from muxjax.outputs import Delta
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.steps import TokenLogprobs
from muxjax.serve.fleet_protocol import FleetLike, StreamLike

_EXPECTED_REASONS = (None, "stop", "length", "abort")
"""Finish reasons that are not errors. At shutdown the server ends streams with 'abort'; a streaming
client keeps the output so far.
"""


@dataclass
class GeneratedOutput:
    """The complete output of one stream."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def append(self, delta: Delta) -> None:
        """Appends the next delta."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs or ())
        self.prompt_logprobs.extend(delta.prompt_logprobs or ())
        self.finish_reason = delta.finish_reason or self.finish_reason


@dataclass(frozen=True)
class GenerationCall:
    """The streams of one call.

    Attributes:
      streams: `num_choices` streams for each prompt, in the order of the response.
      num_choices: outputs per prompt.
    """

    streams: Sequence[StreamLike]
    num_choices: int

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens; each prompt counts once, whatever its number of outputs."""
        return sum(stream.num_prompt_tokens for stream in self.streams[:: self.num_choices])

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache, for the first output of each prompt."""
        return sum(stream.num_cached_tokens for stream in self.streams[:: self.num_choices])

    def cancel(self) -> None:
        """Cancels all streams. Idempotent."""
        for stream in self.streams:
            stream.cancel()

    async def read(self, handle: Callable[[int, Delta], Awaitable[None]]) -> None:
        """Passes every delta of every stream to `handle`, until all streams have ended.

        Streams are read concurrently, so `handle` may run for several streams at a time. Deltas of
        one stream arrive in order.

        Args:
          handle: receives the index of a stream and its next delta.

        Raises:
          MuxError: the error of the first stream that failed; reading of the others stops.
        """
        if len(self.streams) == 1:
            await _read_stream(0, self.streams[0], handle)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for index, stream in enumerate(self.streams):
                    group.create_task(_read_stream(index, stream, handle))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def collect(self) -> list[GeneratedOutput]:
        """Returns the complete output of every stream.

        Raises:
          EngineDead: a stream ended before its output was complete.
        """
        outputs = [GeneratedOutput() for _ in self.streams]

        async def append(index: int, delta: Delta) -> None:
            outputs[index].append(delta)

        await self.read(append)
        if any(output.finish_reason == "abort" for output in outputs):
            raise EngineDead("the server is shutting down and has aborted the request")
        return outputs


async def _read_stream(
    index: int, stream: StreamLike, handle: Callable[[int, Delta], Awaitable[None]]
) -> None:
    async for delta in stream:
        if delta.finish_reason not in _EXPECTED_REASONS:
            raise EngineDead(f"the server has ended the request ({delta.finish_reason})")
        await handle(index, delta)


async def start_generation(
    fleet: FleetLike, model: str, prompts: Sequence[list[int]], params: list[SamplingParams]
) -> GenerationCall:
    """Queues every prompt once per entry of `params`. If one request is invalid, cancels the rest.

    Raises:
      InvalidRequest: the model cannot serve a prompt or its parameters.
      EngineDead: the engine has ended.
    """
    if all(choice.grammar is None for choice in params):
        return _open_streams(fleet, model, prompts, params)
    # Compiling a grammar may take long and would block the event loop.
    opening = asyncio.create_task(asyncio.to_thread(_open_streams, fleet, model, prompts, params))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_cancel_abandoned)
        raise


def _cancel_abandoned(opening: asyncio.Task[GenerationCall]) -> None:
    """Cancels the streams of a call that was cancelled while they were opened."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().cancel()


def _open_streams(
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


async def cancel_on_disconnect[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`; cancels it if the client disconnects.

    Args:
      receive: the ASGI `receive` of the call, whose body has been read.
      work: the coroutine to run.

    Raises:
      ClientDisconnect: the client disconnected before `work` was done.
    """
    working = asyncio.create_task(work)
    disconnected = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        disconnected.cancel()
        await asyncio.gather(working, disconnected, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
