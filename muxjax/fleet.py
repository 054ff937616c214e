"""The Python API of MuxJAX: load a fleet of models and generate text with them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import jax

from muxjax.config.fleet_file import FleetConfig, load_fleet_config
from muxjax.engine.health import ModelHealth, UnitHealth
from muxjax.engine.input_processor import InputProcessor, Prompt, lookup_model
from muxjax.engine.loaded_model import LoadedModel
from muxjax.engine.router import Router
from muxjax.engine.stream import Stream
from muxjax.errors import EngineDead, WrongState
from muxjax.executor.compilation_cache import enable_compilation_cache
from muxjax.model_handle import Message, ModelHandle, ParamsArgument, Tool
from muxjax.outputs import Completion, FleetStats, UnitStats
from muxjax.placement.planner import plan as placement
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.timeline import Timeline
from muxjax.units.build import build_unit, load_progress
from muxjax.units.build_unit_spec import build_unit_spec
from muxjax.units.fleet_admin import FleetAdmin
from muxjax.units.fleet_stats import merge_stats
from muxjax.units.local_unit import LocalUnit
from muxjax.units.memory_check import check_units_fit
from muxjax.units.planned_units import PlannedUnitConfig, single_unit_config, split_by_plan
from muxjax.units.served_unit import ServedUnit

__all__ = ["Fleet", "LoadedModel"]


class Fleet:
    """Several models, served by one unit or by the units of a plan. Create it with `Fleet.load`.

    Safe to use from any number of threads and event loops.

    Attributes:
      models: by name. A model on several units has the smallest of their length limits.
      units: the units that serve them.
    """

    def __init__(
        self,
        units: Sequence[ServedUnit],
        *,
        config: FleetConfig | None = None,
        running: bool = True,
    ) -> None:
        self.units = tuple(units)
        self.models = _merge_replicas(units)
        self._inputs = InputProcessor()
        self._router = Router([unit.supervisor for unit in units]) if running else None
        self._admin = None
        local = [unit for unit in units if isinstance(unit, LocalUnit) and unit.can_change_models]
        if self._router is not None and len(local) == len(units):
            config = config or local[0].spec.config
            self._admin = FleetAdmin(local, self._router, config, on_change=self._update_models)

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
        """Loads the models of a fleet file and compiles all programs that serving needs.

        Args:
          source: path of a fleet file, or its contents as a mapping.
          plan: placement of the models on devices, from `muxjax plan`; None serves all models as
            one unit.
          progress: show progress on standard error if that is a terminal.
          warm_up: False opens the checkpoints and divides the pool, but loads no weights and
            compiles nothing; such a fleet cannot generate.
          poison: test mode: pages that no running request uses are filled with NaN.

        Raises:
          FleetConfigError: the fleet file is not valid.
          CheckpointError, DownloadError: a model cannot be loaded or downloaded.
          PoolTooSmall: the pool cannot hold one request of each model.
          InsufficientMemory: weights and pool need more memory than is free; nothing was loaded.
          PlanError: the plan is not valid, is for other models, or needs more devices.
        """
        config = load_fleet_config(source)
        enable_compilation_cache()
        planned = _split_units(config, plan)
        specs = [
            build_unit_spec(
                unit.config,
                progress=progress,
                poison=poison,
                devices=unit.devices,
                demand=unit.demand,
            )
            for unit in planned
        ]
        if not warm_up:
            units = [
                LocalUnit(unit.name, spec, {}) for unit, spec in zip(planned, specs, strict=True)
            ]
            return cls(units, running=False)
        check_units_fit(specs)
        units = []
        try:
            with load_progress(specs, show=progress) as bars:
                for unit, spec in zip(planned, specs, strict=True):
                    load = unit.planned_load
                    units.append(build_unit(spec, unit.name, progress=bars, planned_load=load))
        except BaseException:
            for local_unit in units:
                local_unit.close()
            raise
        return cls(units, config=config)

    def model(self, name: str) -> ModelHandle:
        """Returns a handle of one model, with the methods of vLLM's `LLM`.

        Raises:
          UnknownModel: the fleet has no such model.
        """
        lookup_model(self.models, name)
        return ModelHandle(name, lambda: self.models, self._inputs, self._running)

    def generate(
        self, model: str, prompts: Prompt | Sequence[Prompt], params: ParamsArgument = None
    ) -> list[Completion]:
        """Completes prompts concurrently and waits for all of them.

        Args:
          model: name of the model in the fleet file.
          prompts: one prompt or several; a prompt is text or a list of token ids.
          params: for all prompts, or one for each.

        Raises:
          UnknownModel, InvalidRequest: a request cannot be served; none was queued.
          EngineDead: the fleet is closed or has failed.
        """
        return self.model(model).generate(prompts, params)

    async def agenerate(
        self, model: str, prompts: Prompt | Sequence[Prompt], params: ParamsArgument = None
    ) -> list[Completion]:
        """As `generate`, without blocking the event loop while tokens are generated."""
        return await self.model(model).agenerate(prompts, params)

    def stream(self, model: str, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Streams the completion of one prompt, for use with `for` or `async for`.

        Raises:
          UnknownModel, InvalidRequest: the request cannot be served; nothing was queued.
          EngineDead: the fleet is closed or has failed.
        """
        return self.model(model).stream(prompt, params)

    def chat(
        self,
        model: str,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: ParamsArgument = None,
        *,
        tools: Sequence[Tool] = (),
    ) -> list[Completion]:
        """Answers conversations concurrently and waits for all answers.

        Args:
          model: name of the model in the fleet file; it must have a chat template.
          messages: one conversation or several; each a list of messages in the form of OpenAI's API
            (`role`, `content`, `tool_calls`, `tool_call_id`).
          params: for all conversations, or one for each.
          tools: functions that the model may call, in the form of OpenAI's API. A grammar makes
            the calls match their schemas; they are returned in `Completion.tool_calls`.

        Raises:
          UnknownModel, InvalidRequest: a request cannot be served; none was queued.
          EngineDead: the fleet is closed or has failed.
        """
        return self.model(model).chat(messages, params, tools=tools)

    async def achat(
        self,
        model: str,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: ParamsArgument = None,
        *,
        tools: Sequence[Tool] = (),
    ) -> list[Completion]:
        """As `chat`, without blocking the event loop while tokens are generated."""
        return await self.model(model).achat(messages, params, tools=tools)

    def chat_stream(
        self,
        model: str,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] = (),
    ) -> Stream:
        """Streams the answer to one conversation, for use with `for` or `async for`.

        With tools, the text of the deltas includes the calls in the model's format.

        Raises:
          UnknownModel, InvalidRequest: the request cannot be served; nothing was queued.
          EngineDead: the fleet is closed or has failed.
        """
        return self.model(model).chat_stream(messages, params, tools=tools)

    @property
    def admin(self) -> FleetAdmin:
        """The operations that load, unload, sleep and wake models while others are served.

        Raises:
          WrongState: the fleet has units in other processes or on several machines.
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
        """Returns the state of each model by name, without waiting for the engines."""
        return {} if self._admin is None else self._admin.states()

    def stats(self, *, block: bool = True) -> FleetStats:
        """Returns counters and gauges: pool, quotas, queues, and the compiled programs.

        A fleet of one unit returns the values of that unit. A fleet of several units returns sums,
        and `units` has the values of each unit by name.

        Args:
          block: wait for the engines, which answer between two steps. False reads the counters
            while the engines may change them, so that it returns even if an engine hangs. The
            values may then be inconsistent, and those of several units are not summed.

        Raises:
          EngineDead: the fleet is closed, or an engine has ended (only if `block`).
        """
        if not block:
            read = {unit.name: cast(UnitStats, unit.state()) for unit in self.units}
            if len(read) == 1:
                return cast(FleetStats, read[self.units[0].name])
            return {"units": read}
        if len(self.units) == 1:
            return cast(FleetStats, self.units[0].stats())
        return cast(FleetStats, merge_stats({unit.name: unit.stats() for unit in self.units}))

    def health(self) -> list[UnitHealth]:
        """Returns the health of each unit, without waiting for the engines."""
        return [unit.health() for unit in self.units]

    def restart(self, unit: str, reason: str) -> None:
        """Restarts the engine of a unit with a new pool and queue, the same weights and programs.

        Its requests continue on a replica or on the restarted unit. A hanging engine is abandoned;
        the memory of its pool is freed when it returns.

        Args:
          unit: name of the unit.
          reason: message of the error for requests that cannot continue.

        Raises:
          EngineDead: there is no such unit, or the fleet is closed or was never started.
        """
        by_name = {served.name: served for served in self.units}
        if unit not in by_name:
            raise EngineDead(f"unit {unit} cannot be restarted: it does not exist")
        by_name[unit].restart(reason)

    def record(self, timeline: Timeline) -> None:
        """Records all subsequent steps of all units in a timeline.

        Raises:
          EngineDead: the fleet was loaded with `warm_up=False`.
        """
        for unit in self.units:
            unit.observe(timeline.observer(f"unit {unit.name}"))

    def close(self) -> None:
        """Fails the running requests and frees the pool. May be called more than once."""
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
            raise EngineDead("the fleet was loaded with warm_up=False: it cannot generate")
        return self._router

    def _update_models(self) -> None:
        """Updates `models` after the models of a unit have changed."""
        before, self.models = self.models, _merge_replicas(self.units)
        for name in before.keys() - self.models.keys():
            self._inputs.forget(name)


def _split_units(
    config: FleetConfig, plan: placement.PlacementPlan | str | os.PathLike[str] | None
) -> list[PlannedUnitConfig]:
    """Returns the units of the plan, or one unit if there is no plan."""
    if plan is None:
        return [single_unit_config(config)]
    if not isinstance(plan, placement.PlacementPlan):
        plan = placement.load_plan(Path(plan))
    return split_by_plan(config, plan, jax.devices())


def _merge_replicas(units: Sequence[ServedUnit]) -> dict[str, LoadedModel]:
    """Returns the models by name; of replicas the first, with the smallest length limit."""
    models: dict[str, LoadedModel] = {}
    for unit in units:
        for name, model in unit.models.items():
            first = models.setdefault(name, model)
            if model.max_model_len < first.max_model_len:
                models[name] = dataclasses.replace(first, max_model_len=model.max_model_len)
    return models
