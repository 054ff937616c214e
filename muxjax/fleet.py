"""The Python face of MuxJAX: load a fleet, ask its models for text."""

from __future__ import annotations

import dataclasses
import itertools
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import jax

from muxjax import loading
from muxjax.cluster.remote_unit import RemoteUnit
from muxjax.config import FleetConfig, load_fleet_config
from muxjax.constraints import Constraints
from muxjax.errors import EngineDead, InvalidRequest, MuxError, UnknownModel
from muxjax.fleet_stats import merged
from muxjax.health import UnitHealth
from muxjax.live_unit import LiveUnit
from muxjax.loading import LoadedModel
from muxjax.output import Delta, Output
from muxjax.placement import plan as placement
from muxjax.placement.demand import expected_demand
from muxjax.planned_units import UnitPart, planned_units
from muxjax.progress import Bars
from muxjax.router import Router
from muxjax.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams
from muxjax.scheduling.requests import FinishReason, Request
from muxjax.scheduling.steps import TokenLogprobs
from muxjax.scheduling.timeline import Timeline
from muxjax.stream import Stream

__all__ = ["Completion", "Delta", "Fleet", "LoadedModel", "Stream"]

Prompt = str | Sequence[int]


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

    def __init__(self, units: Sequence[LiveUnit | RemoteUnit], *, running: bool = True) -> None:
        self.units = tuple(units)
        self.models = _faces(units)
        self._router = Router(units) if running else None
        self._ids = itertools.count()
        self._vocabularies: dict[str, Constraints] = {}
        self._constraints_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        source: FleetConfig | Mapping[str, Any] | str | os.PathLike[str],
        *,
        plan: placement.Plan | str | os.PathLike[str] | None = None,
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
        loading.enable_compilation_cache()
        parts = _parts(config, plan)
        plans = [
            loading.make_plan(
                part.config,
                progress=progress,
                poison=poison,
                devices=part.devices,
                demand=part.demand,
            )
            for part in parts
        ]
        if not warm_up:
            looked_at = [LiveUnit(p.name, made, {}) for p, made in zip(parts, plans, strict=True)]
            return cls(looked_at, running=False)
        programs = [loading.make_programs(made) for made in plans]
        totals = {
            "compiling": sum(len(model.wanted()) for unit in programs for model in unit.values()),
            "loading weights": sum(
                model.param_bytes for made in plans for model in made.models.values()
            ),
        }
        with Bars(totals, show=progress) as bars:
            for made, unit in zip(plans, programs, strict=True):
                loading.load_and_compile(
                    made,
                    unit,
                    loaded=lambda name, size: bars.advance("loading weights", size, name),
                    compiled=lambda program: bars.advance("compiling", 1, program.title),
                )
        return cls(
            [
                LiveUnit(part.name, made, unit, poison=poison, seconds=part.seconds)
                for part, made, unit in zip(parts, plans, programs, strict=True)
            ]
        )

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
        request, output = self._request(model, prompt, params or SamplingParams())
        router = self._running()
        stream = Stream(request.id, len(request.prompt), output, router.cancel)
        router.submit(request, stream)
        return stream

    def units_of(self, model: str) -> list[str]:
        """Names of the units that have a model."""
        return [unit.name for unit in self.units if model in unit.models]

    def stats(self) -> dict[str, Any]:
        """Counters and gauges: pool, quotas, queues, and the compiled programs.

        Those of a fleet's only unit; of several, sums over them, and each for itself in `units`,
        by name.

        Raises:
          EngineDead: the fleet is closed, or a unit's loop has ended.
        """
        if len(self.units) == 1:
            return self.units[0].stats()
        return merged({unit.name: unit.stats() for unit in self.units})

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
            self._request(model, prompt, one)
        streams: list[Stream] = []
        try:
            for prompt, one in zip(many, each, strict=True):
                streams.append(self.open_stream(model, prompt, one))
        except MuxError:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    def _request(self, name: str, prompt: Prompt, params: SamplingParams) -> tuple[Request, Output]:
        model = self.models.get(name)
        if model is None:
            raise UnknownModel(
                f"no model {name!r}; there are {', '.join(self.models)}", field="model"
            )
        tokens = _tokens(model, prompt)
        if len(tokens) >= model.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(tokens)} tokens; {name} takes at most "
                f"{model.max_model_len - 1}, which leaves one for the output",
                field="prompt",
            )
        if params.stop and model.tokenizer is None:
            raise InvalidRequest(
                f"{name} has no tokenizer, so stop strings cannot be found", field="stop"
            )
        own = () if params.ignore_eos else model.eos_token_ids
        stop_ids = tuple(dict.fromkeys((*own, *params.stop_token_ids)))
        if len(stop_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"{len(stop_ids)} stop tokens, {name}'s own {len(own)} included; at most "
                f"{MAX_STOP_TOKEN_IDS}",
                field="stop_token_ids",
            )
        if params.seed is None:
            # Drawn once a request: one that is preempted goes on with the same.
            params = dataclasses.replace(params, seed=secrets.randbits(64))
        # Replicas may have room for unlike lengths; wherever it goes on, it ends at the same.
        longest = min(params.max_tokens, model.max_model_len - len(tokens))
        params = dataclasses.replace(params, max_tokens=longest)
        _check_bias(model, params)
        constraint = None
        if params.grammar is not None:
            constraint = self._constraints(model).start(params.grammar, own)
        request = Request(
            id=next(self._ids),
            model=name,
            prompt=tokens,
            params=params,
            stop_ids=stop_ids,
            arrival=time.perf_counter(),
            constraint=constraint,
        )
        return request, Output(model.tokenizer, params.stop, params.min_tokens)

    def _constraints(self, model: LoadedModel) -> Constraints:
        if model.tokenizer is None:
            raise InvalidRequest(
                f"{model.name} has no tokenizer, so its output cannot follow a grammar",
                field="grammar",
            )
        with self._constraints_lock:
            if model.name not in self._vocabularies:
                self._vocabularies[model.name] = Constraints(
                    model.tokenizer, model.config.vocab_size
                )
            return self._vocabularies[model.name]


def _check_bias(model: LoadedModel, params: SamplingParams) -> None:
    vocab = model.config.vocab_size
    unknown = [token for token in params.logit_bias if token >= vocab]
    if unknown:
        raise InvalidRequest(
            f"{unknown[0]} is not a token id of {model.name}: they are 0 to {vocab - 1}",
            field="logit_bias",
        )


def _parts(
    config: FleetConfig, plan: placement.Plan | str | os.PathLike[str] | None
) -> list[UnitPart]:
    """The units of a fleet: those of the plan, or one."""
    if plan is None:
        return [UnitPart("0", config, loading.unit_devices(config), expected_demand, {})]
    if not isinstance(plan, placement.Plan):
        plan = placement.load_plan(Path(plan))
    return planned_units(config, plan, jax.devices())


def _faces(units: Sequence[LiveUnit | RemoteUnit]) -> dict[str, LoadedModel]:
    """What is told of each model: of replicas the first, with the length that all can take."""
    faces: dict[str, LoadedModel] = {}
    for unit in units:
        for name, model in unit.models.items():
            known = faces.setdefault(name, model)
            if model.max_model_len < known.max_model_len:
                faces[name] = dataclasses.replace(known, max_model_len=model.max_model_len)
    return faces


def _tokens(model: LoadedModel, prompt: Prompt) -> list[int]:
    """The prompt's token ids, checked."""
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("the prompt is empty", field="prompt")
        if model.tokenizer is None:
            raise InvalidRequest(
                f"{model.name} has no tokenizer: give the prompt as token ids", field="prompt"
            )
        tokens = model.tokenizer.encode(prompt)
    else:
        tokens = list(prompt)
    if not tokens:
        raise InvalidRequest("the prompt is empty", field="prompt")
    vocab = model.config.vocab_size
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
            raise InvalidRequest(
                f"{token!r} is not a token id of {model.name}: they are 0 to {vocab - 1}",
                field="prompt",
            )
    return tokens


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
