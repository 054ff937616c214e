"""The interface between the server and a fleet.

`muxjax.fleet.Fleet` implements it, and so does the fake fleet of the tests. `FleetView` of
`access/admission.py` implements `FleetLike` for one caller.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol, runtime_checkable

from muxjax.config.fleet_file import FleetConfig
from muxjax.engine.health import ModelHealth, UnitHealth
from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.outputs import Delta
from muxjax.sampling_params import SamplingParams


@runtime_checkable
class ModelLike(Protocol):
    """A model of the fleet."""

    @property
    def name(self) -> str:
        """The name that requests use."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a model that accepts token ids only."""
        ...

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of prompt and output together."""
        ...


@runtime_checkable
class StreamLike(Protocol):
    """A running request: an asynchronous iterator of deltas, to be iterated once."""

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens."""
        ...

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache; known with the first delta."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def cancel(self) -> None:
        """Cancels the request and frees its pages. Idempotent, callable from any thread."""
        ...

    def end(self, error: BaseException | None = None) -> None:
        """Ends the request for its reader at once, even if the engine hangs.

        Args:
          error: raised to the reader; if None, the reader gets a final delta with the finish reason
            'abort'.
        """
        ...


@runtime_checkable
class FleetLike(Protocol):
    """Models that accept requests."""

    @property
    def models(self) -> Mapping[str, ModelLike]:
        """Models by name."""
        ...

    def stream(
        self, model: str, prompt: str | list[int], params: SamplingParams | None = None
    ) -> StreamLike:
        """Validates and queues a request.

        Raises:
          InvalidRequest: the request is not valid; nothing was queued.
          EngineDead: the engine has ended.
        """
        ...


@runtime_checkable
class FleetAdminLike(Protocol):
    """Changes the models of a fleet while it serves.

    Every method blocks until the change is done, and raises `UnknownModel` or `WrongState`.
    """

    def load(self, entry: Mapping[str, Any] | str, unit: str | None = None) -> None:
        """Loads a model from an entry in fleet file format, or by its name in the fleet file."""
        ...

    def unload(self, model: str) -> None:
        """Unloads a model after its requests have finished."""
        ...

    def sleep(self, model: str) -> None:
        """Puts a model to sleep after its requests have finished."""
        ...

    def wake(self, model: str) -> None:
        """Wakes a model."""
        ...

    def reload(self, source: FleetConfig) -> dict[str, Any]:
        """Applies a fleet file to the running fleet; see `FleetAdmin.reload`."""
        ...


@runtime_checkable
class ManagedFleet(FleetLike, Protocol):
    """A fleet that can be observed, and whose units and models can be changed while it serves."""

    def stats(self, *, block: bool = True) -> Mapping[str, Any]:
        """Counters and gauges of the fleet and of each model.

        Args:
          block: whether to wait for the engines. With False it returns even if an engine hangs, but
            the counters may be inconsistent.

        Raises:
          EngineDead: the engine has ended (only if `block`).
        """
        ...

    def health(self) -> list[UnitHealth]:
        """Health of every unit; does not wait for the engine."""
        ...

    def restart(self, unit: str, reason: str) -> None:
        """Restarts a unit. Its requests continue on a replica or on the unit.

        Args:
          unit: name of the unit.
          reason: message of the error that ends requests which cannot continue.

        Raises:
          EngineDead: the unit cannot be restarted.
        """
        ...

    def model_states(self) -> dict[str, ModelHealth]:
        """State of every model; does not wait for the engine."""
        ...

    @property
    def admin(self) -> FleetAdminLike:
        """Changes the models of the fleet.

        Raises:
          WrongState: the models of this fleet are fixed.
        """
        ...
