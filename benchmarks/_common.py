"""What the benchmarks share: a loaded model, the machine's own rates, timed requests, output."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from muxjax import Fleet, SamplingParams
from muxjax.config.fleet_file import load_fleet_config
from muxjax.engine.loaded_model import LoadedModel
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.executor.programs import ModelPrograms
from muxjax.models.nn.weight_format import Dtype, Quantization, stored_params
from muxjax.units.build import enable_compilation_cache, load_programs, load_progress
from muxjax.units.build_unit_spec import build_unit_spec
from muxjax.units.local_unit import LocalUnit
from muxjax.units.unit_spec import UnitSpec


@dataclass(frozen=True)
class Precision:
    """How a model's matrices are kept and multiplied, as in a fleet file."""

    dtype: Dtype
    quantization: Quantization = "none"


PRECISIONS = {
    "float32": Precision("float32"),
    "bfloat16": Precision("bfloat16"),
    "int8": Precision("float32", "int8"),
}
_READ_BYTES = 512 * 2**20
_MATMUL = (512, 2048, 2048)  # rows of activations, inputs, outputs


@dataclass
class Machine:
    """What this machine can do, measured now and again during a benchmark.

    On a shared machine it changes from minute to minute: each `measure` adds a sample, and the
    medians are what results are compared with.
    """

    reads: list[float] = field(default_factory=list)
    matmuls: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._big = jnp.ones(_READ_BYTES // 4, jnp.float32)
        self._sum = jax.jit(jnp.sum)
        self._dot = jax.jit(
            # As `muxjax.models.nn.linear` has it: the weight to the left.
            lambda w, x: jax.lax.dot_general(
                w,
                x,
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.int32 if w.dtype == jnp.int8 else jnp.float32,
            )
        )

    def measure(self, precision: str | None = None) -> None:
        """Takes a sample of the read bandwidth, and of the rate of products in a precision."""
        self.reads.append(_READ_BYTES / _seconds(lambda: self._sum(self._big)))
        if precision is not None:
            rows, inputs, outputs = _MATMUL
            w, x = jnp.ones((outputs, inputs), precision), jnp.ones((rows, inputs), precision)
            seconds = _seconds(lambda: self._dot(w, x))
            self.matmuls.setdefault(precision, []).append(2 * rows * inputs * outputs / seconds)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a sum over 512 MiB reads."""
        return median(self.reads)

    def matmul_rate(self, precision: str) -> float:
        """Operations a second of a product [512, 2048] x [2048, 2048]."""
        return median(self.matmuls[precision])


def _seconds(call: Callable[[], jax.Array], repeats: int = 5) -> float:
    call().block_until_ready()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call().block_until_ready()
        taken.append(time.perf_counter() - began)
    return median(taken)


@dataclass(frozen=True)
class Loaded:
    """One model, compiled, with its weights on the device."""

    plan: UnitSpec
    model: LoadedModel
    programs: ModelPrograms

    @contextmanager
    def executor(self) -> Iterator[JaxExecutor]:
        """The compiled steps on a pool, with no scheduler around them."""
        found = self.plan.build_executor({self.model.name: self.programs})
        try:
            yield found
        finally:
            found.close()

    @contextmanager
    def fleet(self) -> Iterator[Fleet]:
        """The whole engine."""
        unit = LocalUnit("0", self.plan, {self.model.name: self.programs})
        with Fleet([unit]) as fleet:
            yield fleet


def load(
    source: str, precision: str, *, max_seqs: int, max_model_len: int = 512, policy: str = "adbs"
) -> Loaded:
    """Loads and compiles one model, with progress on standard error."""
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
    with load_progress([plan], show=True) as bars:
        programs = load_programs(plan, progress=bars)
    return Loaded(plan, plan.models["model"], programs["model"])


@dataclass(frozen=True)
class TimedRun:
    """Requests that ran at the same time: for each, when it got how many tokens.

    Attributes:
      began: when they were submitted, in seconds.
      arrivals: for each request, pairs of a time and a number of tokens.
    """

    began: float
    arrivals: list[list[tuple[float, int]]]

    @property
    def seconds(self) -> float:
        """From submission to the last token."""
        return max(request[-1][0] for request in self.arrivals) - self.began

    @property
    def first_token(self) -> float:
        """Seconds to the first token of the first request that got one."""
        return min(request[0][0] for request in self.arrivals) - self.began

    @property
    def tokens(self) -> int:
        return sum(count for request in self.arrivals for _, count in request)

    @property
    def steady_rate(self) -> float:
        """Tokens a second while all requests were decoding.

        From the moment when all had tokens of a decode step to the moment when the first ended. The
        tokens that arrive at the first moment were made before it.
        """
        start = max(request[1][0] for request in self.arrivals)
        end = min(request[-1][0] for request in self.arrivals)
        tokens = sum(
            count for request in self.arrivals for at, count in request if start < at <= end
        )
        return tokens / (end - start)


def run_requests(fleet: Fleet, prompts: Sequence[Sequence[int]], max_tokens: int) -> TimedRun:
    """Runs prompts at once, greedily, each to exactly `max_tokens` tokens."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)

    async def one(prompt: Sequence[int]) -> list[tuple[float, int]]:
        return [
            (time.perf_counter(), len(delta.token_ids))
            async for delta in fleet.stream("model", prompt, params)
            if delta.token_ids
        ]

    async def together() -> list[list[tuple[float, int]]]:
        return await asyncio.gather(*(one(prompt) for prompt in prompts))

    began = time.perf_counter()
    run = TimedRun(began, asyncio.run(together()))
    assert run.tokens == max_tokens * len(prompts), "a request ended early"
    return run


def random_prompts(model: LoadedModel, count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of token ids, all unlike."""
    random = np.random.default_rng(seed)
    return random.integers(0, model.config.vocab_size, (count, length)).tolist()


def step_bytes(model: LoadedModel) -> int:
    """Bytes of weights that a step reads: all but embeddings that are only looked up."""
    config = model.config
    if config.tie_embeddings:
        return model.param_bytes
    kept = stored_params(config, model.dtype, model.quantization)
    looked_up = [kept[name] for name in ("embed", "embed_scales") if name in kept]
    sizes = (int(np.prod(p.shape)) * jnp.dtype(p.dtype).itemsize for p in looked_up)
    return model.param_bytes - sum(sizes)


def token_operations(model: LoadedModel) -> int:
    """Multiplications and additions of a token in the layers' matrices, without the output head."""
    config = model.config
    tables = 1 if config.tie_embeddings else 2
    return 2 * (model.param_count - tables * config.vocab_size * config.hidden_size)


def surroundings() -> dict[str, Any]:
    """Where the figures were measured."""
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


def show(title: str, columns: Sequence[str], rows: Sequence[dict[str, Any]], **notes: Any) -> None:
    """Prints rows as a table; floats with as many digits as they deserve."""
    table = Table(title=title, caption=", ".join(f"{k} {_shown(v)}" for k, v in notes.items()))
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_shown(row[column]) for column in columns))
    Console(width=max(100, Console().width)).print(table)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def print_json(found: dict[str, Any]) -> None:
    """Prints one JSON object."""
    json.dump(found, sys.stdout, indent=2)
    print()
