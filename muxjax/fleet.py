"""The Python face of MuxJAX: load a fleet, ask its models for text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import jax

from muxjax.config.fleet_file import FleetConfig, load_fleet_config
from muxjax.engine.detokenizer import Delta
from muxjax.engine.health import ModelHealth, UnitHealth
from muxjax.engine.input_processor import InputProcessor, Prompt
from muxjax.engine.loaded_model import LoadedModel
from muxjax.engine.router import Router
from muxjax.engine.stream import Stream
from muxjax.errors import EngineDead, InvalidRequest, MuxError, WrongState
from muxjax.placement.planner import plan as placement
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.requests import FinishReason
from muxjax.scheduling.steps import TokenLogprobs
from muxjax.scheduling.timeline import Timeline
from muxjax.units.build import build_unit, enable_compilation_cache, load_progress
from muxjax.units.build_unit_spec import build_unit_spec
from muxjax.units.fleet_admin import FleetAdmin
from muxjax.units.fleet_stats import merge_stats
from muxjax.units.local_unit import LocalUnit
from muxjax.units.planned_units import PlannedUnitConfig, single_unit_config, split_by_plan
from muxjax.units.served_unit import ServedUnit

__all__ = ["Completion", "Delta", "Fleet", "LoadedModel", "Stream"]

_LOOKED_AT = "the fleet was loaded with warm_up=False: it cannot generate"


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt.

    Attributes:
      text: without stop tokens and stop strings; empty for a model that has no tokenizer.
      token_ids: all tokens made, a stop token that ended it included.
      finish_reason: 'stop' (a stop token or string), 'length', or 'cancelled'.
      logprobs: one entry a token, or None if they were not asked for.
      num_prompt_tokens: length of the prompt.
      prompt_logprobs: one entry for each token of the prompt but the first, or None.
      num_cached_tokens: tokens of the prompt that the prefix cache had.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    num_prompt_tokens: int
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = field(default=0, compare=False)


class Fleet:
    """Several models, served by one unit or by those of a plan. Made by `Fleet.load`.

    Safe to use from any number of threads and event loops.

    Attributes:
      models: by name; of a model with replicas, what all of them can take.
      units: where they run.
    """

    def __init__(
        self,
        units: Sequence[ServedUnit],
        *,
        config: FleetConfig | None = None,
        running: bool = True,
    ) -> None:
        self.units = tuple(units)
        self.models = _faces(units)
        self._maker = InputProcessor()
        self._router = Router([unit.supervisor for unit in units]) if running else None
        self._admin = None
        local = [unit for unit in units if isinstance(unit, LocalUnit) and unit.can_change_models]
        if self._router is not None and len(local) == len(units):
            config = config or local[0].spec.config
            self._admin = FleetAdmin(local, self._router, config, on_change=self._take_faces)

    @classmethod
    def load(
        cls,
        source: FleetConfig | Mapping[str, Any] | str | os.PathLike[str],
        *,
        plan: placement.PlacementPlan | str | os.PathLike[str] | None = None,
        progress: bool = True,
        warm_up: bool = True,
        poison: bool = False,
    ) -> Fleet:
        """Loads the models of a fleet file and compiles all that serving will need.

        Args:
          source: path of a fleet file, or the same as a dict.
          plan: which models go on which devices, from `muxjax plan`; without one all models are one
            unit.
          progress: show progress on standard error, where that is a terminal.
          warm_up: False only looks: checkpoints are opened and the pool is planned, but no weights
            are loaded, nothing is compiled, and nothing can be generated.
          poison: test mode: pages hold NaN whenever they are not a running request's.

        Raises:
          FleetConfigError: the fleet file is not valid.
          CheckpointError, DownloadError: a model cannot be had.
          PoolTooSmall: the pool cannot hold one request of each model.
          PlanError: the plan is not valid, is for other models, or needs more devices.
        """
        config = load_fleet_config(source)
        enable_compilation_cache()
        parts = _parts(config, plan)
        specs = [
            build_unit_spec(
                part.config,
                progress=progress,
                poison=poison,
                devices=part.devices,
                demand=part.demand,
            )
            for part in parts
        ]
        if not warm_up:
            units = [LocalUnit(p.name, spec, {}) for p, spec in zip(parts, specs, strict=True)]
            return cls(units, running=False)
        units = []
        try:
            with load_progress(specs, show=progress) as bars:
                for part, spec in zip(parts, specs, strict=True):
                    seconds = part.token_seconds
                    units.append(build_unit(spec, part.name, progress=bars, token_seconds=seconds))
        except BaseException:
            for unit in units:
                unit.close()
            raise
        return cls(units, config=config)

    def generate(
        self,
        model: str,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Completes prompts, all at once, and waits for them.

        Args:
          model: its name in the fleet file.
          prompts: one prompt or several; a prompt is a text or a list of token ids.
          params: for all prompts, or one for each.

        Raises:
          UnknownModel, InvalidRequest: nothing was generated.
          EngineDead: the fleet is closed or has failed.
        """
        streams = self._open_all(model, prompts, params)
        try:
            return [_complete(stream, list(stream)) for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()

    async def agenerate(
        self,
        model: str,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """As `generate`, without blocking the event loop."""
        streams = self._open_all(model, prompts, params)
        try:
            return [_complete(stream, [delta async for delta in stream]) for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()

    def stream(
        self, model: str, prompt: Prompt, params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Completes one prompt, token by token. Closing the iterator cancels the request.

        Raises:
          UnknownModel, InvalidRequest: at once, before the first delta is asked for.
        """
        opened = self.open_stream(model, prompt, params)

        def deltas() -> Iterator[Delta]:
            with opened:
                yield from opened

        return deltas()

    def astream(
        self, model: str, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[Delta]:
        """As `stream`, for `async for`."""
        opened = self.open_stream(model, prompt, params)

        async def deltas() -> AsyncIterator[Delta]:
            with opened:
                async for delta in opened:
                    yield delta

        return deltas()

    def open_stream(
        self, model: str, prompt: Prompt, params: SamplingParams | None = None
    ) -> Stream:
        """Checks a request and queues it; what `stream` and the others are made of.

        Raises:
          UnknownModel, InvalidRequest: the request cannot be served; nothing was queued.
          EngineDead: the fleet is closed or has failed.
        """
        request, output = self._maker.make(self.models, model, prompt, params or SamplingParams())
        router = self._running()
        stream = Stream(request.id, len(request.prompt), output, router.cancel)
        router.submit(request, stream)
        return stream

    def units_of(self, model: str) -> list[str]:
        """Names of the units that have a model."""
        return [unit.name for unit in self.units if model in unit.models]

    @property
    def admin(self) -> FleetAdmin:
        """Loads, unloads, puts to sleep and wakes models, while others are served.

        Raises:
          WrongState: it has units in other processes or on several machines.
          EngineDead: the fleet was loaded with `warm_up=False`.
        """
        self._running()
        if self._admin is None:
            raise WrongState(
                "the models of a fleet that is spread over processes or machines are fixed: change "
                "the fleet file, and restart"
            )
        return self._admin

    def model_states(self) -> dict[str, ModelHealth]:
        """Whether each model is awake; asks no engine."""
        return {} if self._admin is None else self._admin.states()

    def stats(self) -> dict[str, Any]:
        """Counters and gauges: pool, quotas, queues, and the compiled programs.

        Those of a fleet's only unit; of several, sums over them, and each for itself in `units`,
        by name.

        Raises:
          EngineDead: the fleet is closed, or a unit's loop has ended.
        """
        if len(self.units) == 1:
            return self.units[0].stats()
        return merge_stats({unit.name: unit.stats() for unit in self.units})

    def health(self) -> list[UnitHealth]:
        """Whether each unit works. Asks no engine, so it answers when one hangs."""
        return [unit.health() for unit in self.units]

    def state(self) -> dict[str, Any]:
        """The counters, read without asking the engines: for a look at one that hangs.

        They may not agree with each other, as the engines may be changing them.
        """
        if len(self.units) == 1:
            return self.units[0].state()
        return {"units": {unit.name: unit.state() for unit in self.units}}

    def restart(self, unit: str, reason: str) -> None:
        """Starts a unit anew: a new pool and queue, the same weights and programs.

        Its requests go on, in a replica or in the unit; an engine that hangs is left to itself, and
        the memory of its pool is free only when it lets go of it.

        Args:
          unit: its name.
          reason: told to whoever waits.

        Raises:
          EngineDead: the fleet is closed, or was loaded without an engine.
        """
        found = {each.name: each for each in self.units}.get(unit)
        if found is None:
            raise EngineDead(f"unit {unit} cannot be restarted: it does not exist")
        found.restart(reason)

    def record(self, timeline: Timeline) -> None:
        """Records every step of every unit from now on.

        Raises:
          EngineDead: the fleet was loaded with `warm_up=False`.
        """
        for unit in self.units:
            unit.observe(timeline.observer(f"unit {unit.name}"))

    def close(self) -> None:
        """Ends running requests and frees the pool. May be called more than once."""
        if self._admin is not None:
            self._admin.close()
        if self._router is not None:
            self._router.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _running(self) -> Router:
        if self._router is None:
            raise EngineDead(_LOOKED_AT)
        return self._router

    def _take_faces(self) -> None:
        """Notes that there are other models."""
        before, self.models = self.models, _faces(self.units)
        for name in before.keys() - self.models.keys():
            self._maker.forget(name)

    def _open_all(
        self,
        model: str,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Stream]:
        single = isinstance(prompts, str) or (
            len(prompts) > 0 and all(isinstance(token, int) for token in prompts)
        )
        many: Sequence[Any] = [prompts] if single else prompts
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(many)
        else:
            each = list(params)
        if len(each) != len(many):
            raise InvalidRequest(
                f"{len(each)} sampling parameters for {len(many)} prompts", field="params"
            )
        # All are checked before any is queued.
        for prompt, one in zip(many, each, strict=True):
            self._maker.make(self.models, model, prompt, one)
        streams: list[Stream] = []
        try:
            for prompt, one in zip(many, each, strict=True):
                streams.append(self.open_stream(model, prompt, one))
        except MuxError:
            for stream in streams:
                stream.cancel()
            raise
        return streams


def _parts(
    config: FleetConfig, plan: placement.PlacementPlan | str | os.PathLike[str] | None
) -> list[PlannedUnitConfig]:
    """The units of a fleet: those of the plan, or one."""
    if plan is None:
        return [single_unit_config(config)]
    if not isinstance(plan, placement.PlacementPlan):
        plan = placement.load_plan(Path(plan))
    return split_by_plan(config, plan, jax.devices())


def _faces(units: Sequence[ServedUnit]) -> dict[str, LoadedModel]:
    """What is told of each model: of replicas the first, with the length that all can take."""
    faces: dict[str, LoadedModel] = {}
    for unit in units:
        for name, model in unit.models.items():
            known = faces.setdefault(name, model)
            if model.max_model_len < known.max_model_len:
                faces[name] = dataclasses.replace(known, max_model_len=model.max_model_len)
    return faces


def _complete(stream: Stream, deltas: Sequence[Delta]) -> Completion:
    logprobs: list[TokenLogprobs] | None = None
    for delta in deltas:
        if delta.logprobs is not None:
            logprobs = (logprobs or []) + delta.logprobs
    reason = deltas[-1].finish_reason
    assert reason is not None, "a stream ends with its finish reason"
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        finish_reason=reason,
        logprobs=logprobs,
        num_prompt_tokens=stream.num_prompt_tokens,
        prompt_logprobs=deltas[0].prompt_logprobs,
        num_cached_tokens=stream.num_cached_tokens,
    )
