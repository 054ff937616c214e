"""What the server needs of a fleet; `muxjax.fleet.Fleet` has it, and so has the tests' fake."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from muxjax.config.fleet_file import FleetConfig
from muxjax.engine.health import ModelHealth, UnitHealth
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.steps import TokenLogprobs


@runtime_checkable
class DecodeStreamLike(Protocol):
    """Turns tokens into text as they come."""

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty."""
        ...


@runtime_checkable
class TokenizerLike(Protocol):
    """The part of `muxjax.models.tokenizers.tokenizer.Tokenizer` that requests and answers need."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text; False for what a chat template made, which has its own begin."""
        ...

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text of a conversation."""
        ...

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Jinja source, or None."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens, without special ones."""
        ...

    def decode_stream(self) -> DecodeStreamLike:
        """Decodes a sequence as it grows."""
        ...

    def token_text(self, token: int) -> str:
        """One token for people."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token."""
        ...


@runtime_checkable
class ModelLike(Protocol):
    """A loaded model."""

    @property
    def name(self) -> str:
        """What requests call it."""
        ...

    @property
    def tokenizer(self) -> TokenizerLike | None:
        """None for a model that takes token ids only."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        ...


@runtime_checkable
class DeltaLike(Protocol):
    """What a request has made since the last one. `text` may lag behind `token_ids`."""

    @property
    def text(self) -> str: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def logprobs(self) -> Sequence[TokenLogprobs] | None: ...

    @property
    def finish_reason(self) -> str | None: ...

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprobs] | None: ...


@runtime_checkable
class StreamLike(Protocol):
    """A running request. `cancel` frees its pages; after the end it does nothing."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        ...

    @property
    def num_cached_tokens(self) -> int:
        """Those of them that the prefix cache had; known with the first delta."""
        ...

    def __aiter__(self) -> AsyncIterator[DeltaLike]: ...

    def cancel(self) -> None:
        """Ends the request. May be called from any thread and more than once."""
        ...

    def end(self, error: BaseException | None = None) -> None:
        """Ends the request for its reader at once, even if the engine hangs: with an error, or with
        a last delta whose reason is 'abort'.
        """
        ...


@runtime_checkable
class FleetLike(Protocol):
    """Models that answer."""

    @property
    def models(self) -> Mapping[str, ModelLike]:
        """By name."""
        ...

    def stream(
        self, model: str, prompt: str | list[int], params: SamplingParams | None = None
    ) -> StreamLike:
        """Queues a request.

        Raises:
          InvalidRequest: the request cannot be served as asked; nothing was queued.
          EngineDead: the engine has ended.
        """
        ...

    def stats(self, *, block: bool = True) -> Mapping[str, Any]:
        """Counters and gauges.

        Args:
          block: wait for the engines. False returns even when one hangs; the counters may then
            disagree with each other.

        Raises:
          EngineDead: the engine has ended (only if `block`).
        """
        ...


@runtime_checkable
class SupervisedFleet(FleetLike, Protocol):
    """A fleet whose units can be watched and started anew."""

    def health(self) -> list[UnitHealth]:
        """Of each unit; answers when an engine hangs."""
        ...

    def restart(self, unit: str, reason: str) -> None:
        """Ends a unit's requests with `EngineDead` and starts it anew.

        Raises:
          EngineDead: it cannot be.
        """
        ...


@runtime_checkable
class FleetAdminLike(Protocol):
    """Changes the models of a fleet while it serves; every operation blocks.

    Each raises `UnknownModel` for an unknown name, and `WrongState`.
    """

    def load(self, entry: Mapping[str, Any] | str, unit: str | None = None) -> None:
        """Adds a model, by an entry as in a fleet file, or by its name in the fleet's file."""
        ...

    def unload(self, model: str) -> None:
        """Removes a model when its requests have ended."""
        ...

    def sleep(self, model: str) -> None:
        """Puts a model to sleep when its requests have ended."""
        ...

    def wake(self, model: str) -> None:
        """Wakes a model."""
        ...

    def reload(self, source: FleetConfig) -> dict[str, Any]:
        """Applies a fleet file; see `FleetAdmin.reload`."""
        ...


@runtime_checkable
class ManagedFleet(SupervisedFleet, Protocol):
    """A fleet whose models can be changed while it serves."""

    def model_states(self) -> dict[str, ModelHealth]:
        """Returns the state of every model; answers when an engine hangs."""
        ...

    @property
    def admin(self) -> FleetAdminLike:
        """Changes its models.

        Raises:
          WrongState: the models of this fleet are fixed.
        """
        ...
