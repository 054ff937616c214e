"""The handle of one model of a fleet: completes prompts and conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from muxjax.engine.chat_prompt import ChatPrompt
from muxjax.engine.input_processor import InputProcessor, Prompt, lookup_model
from muxjax.engine.loaded_model import LoadedModel
from muxjax.engine.router import Router
from muxjax.engine.stream import Stream
from muxjax.errors import InvalidRequest, MuxError
from muxjax.outputs import Completion
from muxjax.sampling_params import SamplingParams

type Message = Mapping[str, Any]
"""A message of a conversation in the form of OpenAI's API: `role`, `content`, ..."""
type Tool = Mapping[str, Any]
"""A function that the model may call, in the form of OpenAI's API."""
type ParamsArgument = SamplingParams | Sequence[SamplingParams] | None


class ModelHandle:
    """A model by name, with the methods of vLLM's `LLM`; returned by `Fleet.model`.

    Safe to use from any number of threads and event loops.

    Args:
      name: of the model.
      models: returns the models of the fleet by name.
      inputs: shared by the models of the fleet.
      router: returns the fleet's router; raises `EngineDead` if the fleet does not run.
    """

    def __init__(
        self,
        name: str,
        models: Callable[[], Mapping[str, LoadedModel]],
        inputs: InputProcessor,
        router: Callable[[], Router],
    ) -> None:
        self.name = name
        self._models = models
        self._inputs = inputs
        self._router = router

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: ParamsArgument = None
    ) -> list[Completion]:
        """See `Fleet.generate`."""
        return _complete(self._open(_pair_prompts(prompts, params)))

    async def agenerate(
        self, prompts: Prompt | Sequence[Prompt], params: ParamsArgument = None
    ) -> list[Completion]:
        """See `Fleet.agenerate`."""
        return await _acomplete(self._open(_pair_prompts(prompts, params)))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """See `Fleet.stream`."""
        (stream,) = self._open([(prompt, params or SamplingParams())])
        return stream

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: ParamsArgument = None,
        *,
        tools: Sequence[Tool] = (),
    ) -> list[Completion]:
        """See `Fleet.chat`."""
        chats = self._render(messages, params, tools)
        completions = _complete(self._open([(chat.token_ids, chat.params) for chat in chats]))
        return [
            chat.parse_calls(completion)
            for chat, completion in zip(chats, completions, strict=True)
        ]

    async def achat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: ParamsArgument = None,
        *,
        tools: Sequence[Tool] = (),
    ) -> list[Completion]:
        """See `Fleet.achat`."""
        chats = self._render(messages, params, tools)
        streams = self._open([(chat.token_ids, chat.params) for chat in chats])
        completions = await _acomplete(streams)
        return [
            chat.parse_calls(completion)
            for chat, completion in zip(chats, completions, strict=True)
        ]

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] = (),
    ) -> Stream:
        """See `Fleet.chat_stream`."""
        (chat,) = self._render([messages], params, tools)
        return self.stream(chat.token_ids, chat.params)

    def _render(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: ParamsArgument,
        tools: Sequence[Tool],
    ) -> list[ChatPrompt]:
        tokenizer = lookup_model(self._models(), self.name).tokenizer
        is_single = len(messages) > 0 and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if is_single else messages
        return [
            ChatPrompt.render(tokenizer, conversation, conversation_params, tools)
            for conversation, conversation_params in _pair(conversations, params)
        ]

    def _open(self, inputs: Sequence[tuple[Prompt, SamplingParams]]) -> list[Stream]:
        """Queues requests: all of them, or none if one cannot be served.

        Raises:
          MuxError: a request cannot be served; all are checked before any is queued.
        """
        models = self._models()
        prepared = [
            self._inputs.process(models, self.name, prompt, params) for prompt, params in inputs
        ]
        router = self._router()
        streams: list[Stream] = []
        try:
            for request, detokenizer in prepared:
                stream = Stream(request.id, request.prompt, detokenizer, router.cancel)
                router.submit(request, stream.sink)
                streams.append(stream)
        except MuxError:
            _cancel(streams)
            raise
        return streams


def _pair_prompts(
    prompts: Prompt | Sequence[Prompt], params: ParamsArgument
) -> list[tuple[Prompt, SamplingParams]]:
    is_single = isinstance(prompts, str) or (
        len(prompts) > 0 and all(isinstance(token, int) for token in prompts)
    )
    prompt_list: Sequence[Any] = [prompts] if is_single else prompts
    return _pair(prompt_list, params)


def _pair[T](items: Sequence[T], params: ParamsArgument) -> list[tuple[T, SamplingParams]]:
    """Pairs each item with its parameters; single parameters apply to all items.

    Raises:
      InvalidRequest: `params` is a list of another length.
    """
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(items)
    if len(params) != len(items):
        raise InvalidRequest(
            f"{len(params)} sampling parameters for {len(items)} prompts", field="params"
        )
    return list(zip(items, params, strict=True))


def _complete(streams: Sequence[Stream]) -> list[Completion]:
    try:
        return [
            Completion.from_deltas(list(stream), stream.prompt_token_ids, stream.num_cached_tokens)
            for stream in streams
        ]
    finally:
        _cancel(streams)


async def _acomplete(streams: Sequence[Stream]) -> list[Completion]:
    try:
        return [
            Completion.from_deltas(
                [delta async for delta in stream],
                stream.prompt_token_ids,
                stream.num_cached_tokens,
            )
            for stream in streams
        ]
    finally:
        _cancel(streams)


def _cancel(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.cancel()
