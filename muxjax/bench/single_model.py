"""One compiled model with its weights, and timed requests to it, for benchmark scripts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from muxjax import Fleet, SamplingParams
from muxjax.config.fleet_file import load_fleet_config
from muxjax.engine.loaded_model import LoadedModel
from muxjax.executor.compilation_cache import enable_compilation_cache
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.executor.programs import ModelPrograms
from muxjax.models.nn.weight_format import Dtype, Quantization, stored_params
from muxjax.units.build import load_programs, load_progress
from muxjax.units.build_unit_spec import build_unit_spec
from muxjax.units.local_unit import LocalUnit
from muxjax.units.unit_spec import UnitSpec


@dataclass(frozen=True)
class Precision:
    """Storage and compute type of a model's matrices, as in a fleet file."""

    dtype: Dtype
    quantization: Quantization = "none"


PRECISIONS = {
    "float32": Precision("float32"),
    "bfloat16": Precision("bfloat16"),
    "int8": Precision("float32", "int8"),
}


@dataclass(frozen=True)
class CompiledModel:
    """A compiled model with its weights on the device."""

    plan: UnitSpec
    model: LoadedModel
    programs: ModelPrograms

    @contextmanager
    def executor(self) -> Iterator[JaxExecutor]:
        """An executor with a pool and no scheduler."""
        executor = JaxExecutor(
            self.plan.devices,
            {self.model.name: self.programs},
            self.plan.kv,
            dummy_pages=self.plan.dummy_pages,
        )
        try:
            yield executor
        finally:
            executor.close()

    @contextmanager
    def fleet(self) -> Iterator[Fleet]:
        """A fleet that serves the model."""
        unit = LocalUnit("0", self.plan, {self.model.name: self.programs})
        with Fleet([unit]) as fleet:
            yield fleet


def load(
    source: str, precision: str, *, max_seqs: int, max_model_len: int = 512, policy: str = "adbs"
) -> CompiledModel:
    """Loads and compiles one model; shows progress on standard error."""
    kind = PRECISIONS[precision]
    entry = {
        "name": "model",
        "source": source,
        "dtype": kind.dtype,
        "quantization": kind.quantization,
        "max_model_len": max_model_len,
    }
    config = load_fleet_config(
        {
            "models": [entry],
            "pool": {"memory": "512MiB", "prefix_cache": False},
            "policy": policy,
            "engine": {"max_seqs": max_seqs},
        }
    )
    enable_compilation_cache()
    plan = build_unit_spec(config)
    with load_progress([plan], show=True) as progress:
        programs = load_programs(plan, progress=progress)
    return CompiledModel(plan, plan.models["model"], programs["model"])


@dataclass(frozen=True)
class TimedRun:
    """Requests that ran concurrently, and the arrival times of their tokens.

    Attributes:
      began: time of submission, in seconds.
      arrivals: for each request, pairs of time and number of tokens.
    """

    began: float
    arrivals: list[list[tuple[float, int]]]

    @property
    def seconds(self) -> float:
        """Seconds from submission to the last token."""
        return max(request[-1][0] for request in self.arrivals) - self.began

    @property
    def first_token(self) -> float:
        """Seconds from submission to the first token of any request."""
        return min(request[0][0] for request in self.arrivals) - self.began

    @property
    def tokens(self) -> int:
        return sum(count for request in self.arrivals for _, count in request)

    @property
    def steady_rate(self) -> float:
        """Tokens per second while all requests were decoding.

        The interval starts when every request has tokens from a decode step, and ends when the
        first request finishes. Tokens that arrive at the start are not counted: they were
        generated before it.
        """
        start = max(request[1][0] for request in self.arrivals)
        end = min(request[-1][0] for request in self.arrivals)
        tokens = sum(
            count for request in self.arrivals for at, count in request if start < at <= end
        )
        return tokens / (end - start)


def run_requests(fleet: Fleet, prompts: Sequence[Sequence[int]], max_tokens: int) -> TimedRun:
    """Runs prompts concurrently with greedy sampling, each to exactly `max_tokens` tokens."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)

    async def timed_tokens(prompt: Sequence[int]) -> list[tuple[float, int]]:
        return [
            (time.perf_counter(), len(delta.token_ids))
            async for delta in fleet.stream("model", prompt, params)
            if delta.token_ids
        ]

    async def run_all() -> list[list[tuple[float, int]]]:
        return await asyncio.gather(*(timed_tokens(prompt) for prompt in prompts))

    began = time.perf_counter()
    run = TimedRun(began, asyncio.run(run_all()))
    assert run.tokens == max_tokens * len(prompts), "a request ended early"
    return run


def random_prompts(model: LoadedModel, count: int, length: int, seed: int) -> list[list[int]]:
    """Random prompts of token ids."""
    random = np.random.default_rng(seed)
    return random.integers(0, model.config.vocab_size, (count, length)).tolist()


def step_bytes(model: LoadedModel) -> int:
    """Bytes of weights that a step reads: all except embedding tables that are only looked up."""
    config = model.config
    if config.tie_embeddings:
        return model.param_bytes
    stored = stored_params(config, model.dtype, model.quantization)
    looked_up = [stored[name] for name in ("embed", "embed_scales") if name in stored]
    sizes = (int(np.prod(p.shape)) * jnp.dtype(p.dtype).itemsize for p in looked_up)
    return model.param_bytes - sum(sizes)


def token_operations(model: LoadedModel) -> int:
    """Multiplications and additions per token in the layers' matrices, without the output head."""
    config = model.config
    tables = 1 if config.tie_embeddings else 2
    return 2 * (model.param_count - tables * config.vocab_size * config.hidden_size)
