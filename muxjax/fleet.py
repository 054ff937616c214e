"""The Python face of MuxJAX: load a fleet, ask its models for text."""

from __future__ import annotations

import dataclasses
import itertools
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from muxjax import loading
from muxjax.config import FleetConfig, load_fleet_config
from muxjax.constraints import Constraints
from muxjax.engine import Engine, Observer
from muxjax.errors import EngineDead, InvalidRequest, MuxError, UnknownModel
from muxjax.health import UnitHealth
from muxjax.jax_executor import JaxExecutor
from muxjax.loading import LoadedModel
from muxjax.output import Delta, Output
from muxjax.programs import Program
from muxjax.progress import Bars
from muxjax.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams
from muxjax.scheduling.requests import FinishReason, Request
from muxjax.scheduling.steps import TokenLogprobs
from muxjax.scheduling.unit import Unit
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
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    num_prompt_tokens: int
    prompt_logprobs: list[TokenLogprobs] | None = None


class Fleet:
    """Several models on one pool, served by one engine. Made by `Fleet.load`.

    Safe to use from any number of threads and event loops.
    """

    def __init__(
        self,
        models: Mapping[str, LoadedModel],
        plan: loading.Plan,
        programs: Sequence[Program],
        engine: Engine | None,
        executor: JaxExecutor | None,
        start: Callable[[Unit], tuple[Engine, JaxExecutor]] | None = None,
    ) -> None:
        self.models = dict(models)
        self._plan = plan
        self._programs = list(programs)
        self._engine = engine
        self._executor = executor
        self._start = start
        self._unit = plan.unit
        self._observer: Observer | None = None
        self._restarts = 0
        self._closed = False
        self._changing = threading.Lock()
        self._ids = itertools.count()
        self._vocabularies: dict[str, Constraints] = {}
        self._constraints_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        source: FleetConfig | Mapping[str, Any] | str | os.PathLike[str],
        *,
        progress: bool = True,
        warm_up: bool = True,
        poison: bool = False,
    ) -> Fleet:
        """Loads the models of a fleet file and compiles all that serving will need.

        Args:
          source: path of a fleet file, or the same as a dict.
          progress: show progress on standard error, where that is a terminal.
          warm_up: False only looks: checkpoints are opened and the pool is planned, but no weights
            are loaded, nothing is compiled, and nothing can be generated.
          poison: test mode: pages hold NaN whenever they are not a running request's.

        Raises:
          FleetConfigError: the fleet file is not valid.
          CheckpointError, DownloadError: a model cannot be had.
          PoolTooSmall: the pool cannot hold one request of each model.
        """
        config = load_fleet_config(source)
        loading.enable_compilation_cache()
        plan = loading.make_plan(config, progress=progress, poison=poison)
        if not warm_up:
            return cls(plan.models, plan, [], None, None)
        programs = loading.make_programs(plan)
        totals = {
            "compiling": sum(len(model.wanted()) for model in programs.values()),
            "loading weights": sum(model.param_bytes for model in plan.models.values()),
        }
        with Bars(totals, show=progress) as bars:
            loading.load_and_compile(
                plan,
                programs,
                loaded=lambda name, size: bars.advance("loading weights", size, name),
                compiled=lambda program: bars.advance("compiling", 1, program.title),
            )

        def start(unit: Unit) -> tuple[Engine, JaxExecutor]:
            executor = JaxExecutor(programs, plan.kv, dummy_pages=plan.dummy_pages, poison=poison)
            return Engine(unit, executor, poison=poison), executor

        done = [program for model in programs.values() for program in model.programs()]
        return cls(plan.models, plan, done, *start(plan.unit), start)

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
        engine = self._running_engine()
        stream = Stream(request.id, len(request.prompt), output, engine.cancel)
        engine.submit(request, stream)
        return stream

    def stats(self) -> dict[str, Any]:
        """Counters and gauges: pool, quotas, queues, and the compiled programs.

        Raises:
          EngineDead: the fleet is closed or has failed.
        """
        found = self._unit.stats() if self._engine is None else self._engine.stats()
        found["pool_address"] = None
        if self._engine is not None and self._executor is not None:
            executor = self._executor
            # On the loop's thread: between steps, as each step takes the pool's array and gives
            # another for the same memory.
            found["pool_address"] = self._engine.call(lambda unit: executor.pool_address)
        found["pool_bytes"] = self._plan.pool_bytes
        found["page_rows"] = self._plan.kv.shape[1]
        found["programs"] = [
            {
                "model": program.model,
                "kind": program.kind,
                "size": program.size,
                "compile_seconds": program.compile_seconds,
                "temp_bytes": program.temp_bytes,
                "argument_bytes": program.argument_bytes,
            }
            for program in self._programs
        ]
        return found

    def health(self) -> list[UnitHealth]:
        """Whether each unit works. Asks no engine, so it answers when one hangs."""
        engine = self._engine
        return [
            UnitHealth(
                unit="0",
                models=tuple(self.models),
                alive=engine is not None and engine.alive,
                stalled_seconds=0.0 if engine is None else engine.stalled_seconds,
                reason=None if engine is None or engine.error is None else str(engine.error),
                restarts=self._restarts,
            )
        ]

    def state(self) -> dict[str, Any]:
        """The counters, read without asking the engine: for a look at one that hangs.

        They may not agree with each other, as the engine may be changing them.
        """
        return self._unit.stats()

    def restart(self, unit: str, reason: str) -> None:
        """Starts a unit anew: a new pool and queue, the same weights and programs.

        Its requests end with `EngineDead`; an engine that hangs is left to itself, and the memory
        of its pool is free only when it lets go of it.

        Args:
          unit: its name.
          reason: told to whoever waits.

        Raises:
          EngineDead: the fleet is closed, or was loaded without an engine.
        """
        with self._changing:
            if self._start is None or self._engine is None or self._closed or unit != "0":
                raise EngineDead(f"unit {unit} cannot be restarted: it is closed or does not exist")
            self._engine.abandon(reason)
            self._unit = self._plan.make_unit()
            self._engine, self._executor = self._start(self._unit)
            self._engine.observe(self._observer)
            self._restarts += 1

    def observe(self, observer: Observer | None) -> None:
        """Shows every step from now on to a function, or to none; see `engine.Observer`.

        Raises:
          EngineDead: the fleet was loaded with `warm_up=False`.
        """
        self._observer = observer
        self._running_engine().observe(observer)

    def close(self) -> None:
        """Ends running requests and frees the pool. May be called more than once."""
        with self._changing:
            self._closed = True
            if self._engine is not None:
                self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise EngineDead("the fleet was loaded with warm_up=False: it cannot generate")
        return self._engine

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
    )
