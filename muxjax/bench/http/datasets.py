"""Data sets of prompts and their arrival patterns, under the names of vLLM's benchmark.

| data set | prompts | outputs |
|---|---|---|
| `random` | random words or tokens, `--random-input-len` of them | `--random-output-len` |
| `sharegpt` | first turns of `--dataset-path` | lengths of the responses in the file |
| `custom` | `{"prompt": ..., "output_tokens": ...}` lines of `--dataset-path` | `output_tokens` of the line, or `--custom-output-len` |
| `burstgpt` | random, with the lengths of BurstGPT's CSV at `--dataset-path` | lengths in the file |
| `trace` | random, with the lengths, times and models of a trace (docs/guides/simulation.md) | lengths in the file |

Gaps between arrivals follow a gamma distribution with mean 1 / `--request-rate` (`--burstiness` is its
shape; 1 is a Poisson process), scaled, as in vLLM, so that the last request is due at
`requests / rate`. With `--ramp-up-strategy` the rate grows during the run.
"""  # noqa: E501  a table

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from muxjax.bench.http.client import RequestInput
from muxjax.bench.http.prompts import PromptGenerator
from muxjax.errors import BenchError, WorkloadError
from muxjax.placement.workload.arrivals import power_law_rates
from muxjax.placement.workload.sharegpt import SHAREGPT_LIMITS
from muxjax.placement.workload.trace_files import open_trace

DataSet = Literal["random", "sharegpt", "custom", "burstgpt", "trace"]
_DEFAULT_OUTPUT = 256
"""Output tokens of a custom prompt without `output_tokens`: vLLM's default."""
DATA_SETS: tuple[DataSet, ...] = ("random", "sharegpt", "custom", "burstgpt", "trace")


@dataclass(frozen=True)
class Prompts:
    """A data set and the number of prompts to take from it.

    Attributes:
      name: name of the data set.
      path: its file; None for `random`.
      count: total number of requests.
      input_len, output_len, range_ratio, prefix_len: for `random`. Lengths are uniform from
        `(1 - ratio) len` to `(1 + ratio) len`. All prompts of a model share a prefix of
        `prefix_len` tokens.
      fixed_output: output tokens of every request, in place of the data set's.
      shuffle: draw from the file in random order.
      oversample: repeat the file if it has fewer than `count` prompts.
      seed: seed of the prompts and their order.
    """

    name: DataSet = "random"
    path: Path | None = None
    count: int = 1000
    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0
    fixed_output: int | None = None
    shuffle: bool = True
    oversample: bool = True
    seed: int = 0

    @property
    def synthetic(self) -> bool:
        """Whether prompts are random, so that output lengths must be enforced (`ignore_eos`)."""
        return self.name in ("random", "burstgpt", "trace")

    def __post_init__(self) -> None:
        if self.name not in DATA_SETS:
            raise BenchError(f"no data set {self.name!r}; there are {', '.join(DATA_SETS)}")
        if (self.path is None) != (self.name == "random"):
            raise BenchError(
                "--dataset-name random takes no --dataset-path"
                if self.name == "random"
                else f"--dataset-name {self.name} needs --dataset-path"
            )
        if self.count < 1:
            raise BenchError(f"--num-prompts must be at least 1, not {self.count}")
        if self.input_len < 1 or self.output_len < 1 or self.prefix_len < 0:
            raise BenchError(
                "input and output lengths must be at least 1 token, the prefix length at least 0"
            )
        if self.fixed_output is not None and self.fixed_output < 1:
            raise BenchError(f"the output length must be at least 1 token, not {self.fixed_output}")
        if not 0 <= self.range_ratio < 1:
            raise BenchError(
                f"--random-range-ratio must be at least 0 and below 1, not {self.range_ratio}"
            )


@dataclass(frozen=True)
class ArrivalPattern:
    """When requests are sent.

    Attributes:
      rate: requests per second over all models; infinite: all at the start.
      burstiness: shape of the gamma distribution of the gaps.
      ramp: 'linear' or 'exponential' growth of the rate from `ramp_from` to `ramp_to`.
    """

    rate: float = math.inf
    burstiness: float = 1.0
    ramp: Literal["linear", "exponential"] | None = None
    ramp_from: float | None = None
    ramp_to: float | None = None

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise BenchError(f"--request-rate must be above 0 (or inf), not {self.rate}")
        if not (math.isfinite(self.burstiness) and self.burstiness > 0):
            raise BenchError(f"--burstiness must be above 0, not {self.burstiness}")
        ends = (self.ramp_from, self.ramp_to)
        if self.ramp is None:
            if ends != (None, None):
                raise BenchError(
                    "--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy"
                )
            return
        if math.isfinite(self.rate):
            raise BenchError("--request-rate and --ramp-up-strategy exclude each other")
        if self.ramp_from is None or self.ramp_to is None:
            raise BenchError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
        lowest = 0.0 if self.ramp == "linear" else 1e-9
        if not lowest <= self.ramp_from <= self.ramp_to or self.ramp_to <= 0:
            raise BenchError(
                "--ramp-up-start-rps must not be above --ramp-up-end-rps, and must be above 0 for "
                "an exponential ramp"
            )

    def times(self, count: int, seed: int) -> list[float]:
        """Due times of `count` requests, in seconds from the start."""
        if self.ramp is None and math.isinf(self.rate):
            return [0.0] * count
        rng = np.random.default_rng([seed, 5])
        gaps = rng.gamma(self.burstiness, 1 / self.burstiness, size=count)
        rates = np.array([self._rate(index / max(1, count - 1)) for index in range(count)])
        times = np.cumsum(gaps / rates)
        if self.ramp is None:
            times *= count / self.rate / times[-1]
        return times.tolist()

    def _rate(self, progress: float) -> float:
        if self.ramp is None or self.ramp_from is None or self.ramp_to is None:
            return self.rate
        if self.ramp == "linear":
            return max(1e-3, self.ramp_from + (self.ramp_to - self.ramp_from) * progress)
        return self.ramp_from * (self.ramp_to / self.ramp_from) ** progress


def model_shares(models: Sequence[str], alpha: float | None) -> dict[str, float]:
    """The share of the requests that each model receives: equal, or by a power law in model order.

    Raises:
      WorkloadError: a negative `alpha`.
    """
    shares = power_law_rates(len(models), alpha or 0.0, total=1.0)
    return dict(zip(models, shares, strict=True))


def build_request_inputs(
    prompts: Prompts,
    arrivals: ArrivalPattern,
    generators: Mapping[str, PromptGenerator],
    shares: Mapping[str, float],
    model_map: Mapping[str, str] | None = None,
) -> list[RequestInput]:
    """All requests of a run.

    Args:
      prompts: the data set.
      arrivals: when requests are sent; must be the default for a trace, which contains times.
      generators: prompt generator of each model.
      shares: share of the requests of each model.
      model_map: maps a trace's model names to the server's.

    Raises:
      BenchError: a file that cannot be read, or options that exclude each other.
      WorkloadError: a trace names a model that is not benchmarked.
    """
    rng = random.Random(prompts.seed)
    names = rng.choices(list(shares), weights=list(shares.values()), k=prompts.count)
    if prompts.name == "trace":
        if arrivals != ArrivalPattern():
            raise BenchError(
                "--dataset-name trace has its own arrival times: omit the rate options"
            )
        return list(_trace_inputs(prompts, generators, names, model_map or {}))
    if model_map:
        raise BenchError("--map is for --dataset-name trace")
    inputs = list(_untimed_inputs(prompts, generators, names, rng))
    times = arrivals.times(len(inputs), prompts.seed)
    return [replace(request, arrival=time) for request, time in zip(inputs, times, strict=True)]


def _untimed_inputs(
    prompts: Prompts,
    generators: Mapping[str, PromptGenerator],
    names: Sequence[str],
    rng: random.Random,
) -> Iterator[RequestInput]:
    if prompts.name == "random":
        return _random_inputs(prompts, generators, names, rng)
    if prompts.name == "burstgpt":
        return _burstgpt_inputs(prompts, generators, names, rng)
    return _text_inputs(prompts, generators, names, rng)


def _random_inputs(
    prompts: Prompts,
    generators: Mapping[str, PromptGenerator],
    names: Sequence[str],
    rng: random.Random,
) -> Iterator[RequestInput]:
    prefixes: dict[str, Any] = {}

    def vary(length: int) -> int:
        low = max(1, math.floor(length * (1 - prompts.range_ratio)))
        return rng.randint(low, math.ceil(length * (1 + prompts.range_ratio)))

    for name in names:
        generator = generators[name]
        tokens, output = vary(prompts.input_len), vary(prompts.output_len)
        prompt = generator.generate(tokens)
        if prompts.prefix_len:
            prefix = prefixes.setdefault(name, generator.generate(prompts.prefix_len))
            prompt = f"{prefix} {prompt}" if isinstance(prompt, str) else prefix + prompt
            tokens += prompts.prefix_len
        yield RequestInput(name, prompt, tokens, output)


def _text_inputs(
    prompts: Prompts,
    generators: Mapping[str, PromptGenerator],
    names: Sequence[str],
    rng: random.Random,
) -> Iterator[RequestInput]:
    assert prompts.path is not None
    entries = list(_sharegpt(prompts.path) if prompts.name == "sharegpt" else _custom(prompts.path))
    for name, (text, response) in zip(names, _draw(entries, prompts, rng), strict=False):
        generator = generators[name]
        tokens = generator.count(text)
        if prompts.fixed_output is not None:
            output = prompts.fixed_output
        else:
            output = response if isinstance(response, int) else generator.count(response)
        yield RequestInput(name, text, max(1, tokens), max(1, output))


def _burstgpt_inputs(
    prompts: Prompts,
    generators: Mapping[str, PromptGenerator],
    names: Sequence[str],
    rng: random.Random,
) -> Iterator[RequestInput]:
    assert prompts.path is not None
    entries = [(entry.prompt_tokens, entry.output_tokens) for entry in open_trace(prompts.path)]
    for name, (tokens, output) in zip(names, _draw(entries, prompts, rng), strict=False):
        if prompts.fixed_output is not None:
            output = prompts.fixed_output
        yield RequestInput(name, generators[name].generate(tokens), tokens, output)


def _trace_inputs(
    prompts: Prompts,
    generators: Mapping[str, PromptGenerator],
    names: Sequence[str],
    model_map: Mapping[str, str],
) -> Iterator[RequestInput]:
    assert prompts.path is not None
    for drawn, entry in zip(names, open_trace(prompts.path), strict=False):
        name = model_map.get(entry.model, entry.model) or drawn
        if name not in generators:
            raise WorkloadError(
                f"the trace names the model {name}, which is not benchmarked; map it to one of "
                f"{', '.join(generators)} with --map {name}=MODEL"
            )
        output = entry.output_tokens if prompts.fixed_output is None else prompts.fixed_output
        prompt = generators[name].generate(entry.prompt_tokens)
        yield RequestInput(name, prompt, entry.prompt_tokens, output, entry.arrival)


def _draw(entries: list[Any], prompts: Prompts, rng: random.Random) -> Iterator[Any]:
    if prompts.shuffle:
        rng.shuffle(entries)
    return itertools.cycle(entries) if prompts.oversample else iter(entries)


def _sharegpt(path: Path) -> Iterator[tuple[str, str]]:
    """First turns within vLLM's length limits, estimated at four bytes per token."""
    data = _json(path)
    if not isinstance(data, list):
        raise BenchError(f"{path}: a ShareGPT file is a list of conversations")
    shortest, longest_prompt, longest = (4 * limit for limit in SHAREGPT_LIMITS)
    count = 0
    for index, entry in enumerate(data):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise BenchError(f"{path}: [{index}] has no list of conversations")
        if len(turns) < 2:
            continue
        try:
            prompt, response = (str(turn["value"]) for turn in turns[:2])
        except (KeyError, TypeError) as error:
            raise BenchError(f"{path}: [{index}] has a turn without a text value") from error
        sizes = len(prompt.encode()), len(response.encode())
        if min(sizes) >= shortest and sizes[0] <= longest_prompt and sum(sizes) <= longest:
            count += 1
            yield prompt, response
    if not count:
        raise BenchError(f"{path}: no conversation of a usable length")


def _custom(path: Path) -> Iterator[tuple[str, int | str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: {error}") from error
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(f'{path}:{number}: expected {{"prompt": "..."}}') from error
        if not isinstance(prompt, str) or not prompt:
            raise BenchError(f"{path}:{number}: the prompt must be a non-empty text")
        output = row.get("output_tokens", _DEFAULT_OUTPUT)
        if isinstance(output, bool) or not isinstance(output, int) or output < 1:
            raise BenchError(f"{path}:{number}: output_tokens must be an integer above 0")
        count += 1
        yield prompt, output
    if not count:
        raise BenchError(f"{path}: no prompts in the file")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BenchError(f"{path}: not JSON: {error}") from error
