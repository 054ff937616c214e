"""What is asked of a server: data sets, and when their requests are due. Names are vLLM's.

| data set | prompts | outputs |
|---|---|---|
| `random` | random words or tokens, `--random-input-len` of them | `--random-output-len` |
| `sharegpt` | first turns of `--dataset-path` | as long as the answers there |
| `custom` | `{"prompt": ..., "output_tokens": ...}` lines of `--dataset-path` | what the line says, or `--custom-output-len` |
| `burstgpt` | random, with the lengths of BurstGPT's CSV at `--dataset-path` | as long as there |
| `trace` | random, with the lengths, times and models of a trace (docs/simulation.md) | as long as there |

Due times follow `--request-rate` with gaps of a gamma distribution (`--burstiness` is its shape: 1 is
Poisson's), scaled, as vLLM does, so that the last request is due at `requests / rate`; or ramp up.
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
"""Output tokens of a custom prompt that does not say: vLLM's."""
DATA_SETS: tuple[DataSet, ...] = ("random", "sharegpt", "custom", "burstgpt", "trace")


@dataclass(frozen=True)
class Prompts:
    """Which prompts, and how many.

    Attributes:
      name: of the data set.
      path: its file; none for `random`.
      count: requests in all.
      input_len, output_len, range_ratio, prefix_len: of `random`; lengths are drawn evenly from
        `(1 - ratio) len` to `(1 + ratio) len`, and all prompts of a model begin with the same
        prefix.
      fixed_output: output tokens in place of what the data set says.
      shuffle: draw from the file in random order.
      oversample: begin anew where the file has too few.
      seed: the same gives the same.
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
        """Whether prompts mean nothing, so that outputs have to be told how long to be."""
        return self.name in ("random", "burstgpt", "trace")

    def __post_init__(self) -> None:
        if self.name not in DATA_SETS:
            raise BenchError(f"no data set {self.name!r}; there are {', '.join(DATA_SETS)}")
        if (self.path is None) != (self.name == "random"):
            raise BenchError(
                "--dataset-name random takes no --dataset-path"
                if self.name == "random"
                else f"--dataset-name {self.name} needs its file: --dataset-path"
            )
        if self.count < 1:
            raise BenchError(f"--num-prompts must be at least 1, not {self.count}")
        if self.input_len < 1 or self.output_len < 1 or self.prefix_len < 0:
            raise BenchError("lengths must be a token at least")
        if self.fixed_output is not None and self.fixed_output < 1:
            raise BenchError(f"outputs must have a token at least, not {self.fixed_output}")
        if not 0 <= self.range_ratio < 1:
            raise BenchError(f"--random-range-ratio is from 0 to under 1, not {self.range_ratio}")


@dataclass(frozen=True)
class ArrivalPattern:
    """When requests are due.

    Attributes:
      rate: requests a second in all; infinite: all at once.
      burstiness: shape of the gaps' gamma distribution.
      ramp: 'linear' or 'exponential' growth of the rate, from `ramp_from` to `ramp_to`.
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
        least = 0.0 if self.ramp == "linear" else 1e-9
        if not least <= self.ramp_from <= self.ramp_to or self.ramp_to <= 0:
            raise BenchError(
                "the ramp goes up: --ramp-up-start-rps is not above --ramp-up-end-rps, and for an "
                "exponential one above 0"
            )

    def times(self, count: int, seed: int) -> list[float]:
        """When each of so many requests is due, in seconds from the start."""
        if self.ramp is None and math.isinf(self.rate):
            return [0.0] * count
        rng = np.random.default_rng([seed, 5])
        gaps = rng.gamma(self.burstiness, 1 / self.burstiness, size=count)
        rates = np.array([self._rate(index / max(1, count - 1)) for index in range(count)])
        times = np.cumsum(gaps / rates)
        if self.ramp is None:
            times *= count / self.rate / times[-1]
        return times.tolist()

    def _rate(self, done: float) -> float:
        if self.ramp is None or self.ramp_from is None or self.ramp_to is None:
            return self.rate
        if self.ramp == "linear":
            return max(1e-3, self.ramp_from + (self.ramp_to - self.ramp_from) * done)
        return self.ramp_from * (self.ramp_to / self.ramp_from) ** done


def shares_of(models: Sequence[str], alpha: float | None) -> dict[str, float]:
    """Each model's part of the requests: equal, or by a power law in the order of the models.

    Raises:
      WorkloadError: a negative `alpha`.
    """
    parts = power_law_rates(len(models), alpha or 0.0, total=1.0)
    return dict(zip(models, parts, strict=True))


def build_request_inputs(
    prompts: Prompts,
    pace: ArrivalPattern,
    prompters: Mapping[str, PromptGenerator],
    shares: Mapping[str, float],
    renamed: Mapping[str, str] | None = None,
) -> list[RequestInput]:
    """All requests.

    Args:
      prompts: which.
      pace: when they are due; a trace has its own times, and takes no pace.
      prompters: of each model.
      shares: of each model, its part of the requests.
      renamed: for traces, who serves a trace's model.

    Raises:
      BenchError, WorkloadError: a file that cannot be used.
    """
    rng = random.Random(prompts.seed)
    names = rng.choices(list(shares), weights=list(shares.values()), k=prompts.count)
    if prompts.name == "trace":
        if pace != ArrivalPattern():
            raise BenchError("--dataset-name trace has its own times: leave the rate options out")
        return list(_trace(prompts, prompters, names, renamed or {}))
    if renamed:
        raise BenchError("--map is for --dataset-name trace")
    asks = list(_source(prompts, prompters, names, rng))
    times = pace.times(len(asks), prompts.seed)
    return [replace(ask, arrival=time) for ask, time in zip(asks, times, strict=True)]


def _source(
    prompts: Prompts,
    prompters: Mapping[str, PromptGenerator],
    names: Sequence[str],
    rng: random.Random,
) -> Iterator[RequestInput]:
    if prompts.name == "random":
        return _random(prompts, prompters, names, rng)
    if prompts.name == "burstgpt":
        return _lengths_of(prompts, prompters, names, rng)
    return _texts(prompts, prompters, names, rng)


def _random(
    prompts: Prompts,
    prompters: Mapping[str, PromptGenerator],
    names: Sequence[str],
    rng: random.Random,
) -> Iterator[RequestInput]:
    prefixes: dict[str, Any] = {}

    def around(length: int) -> int:
        low = max(1, math.floor(length * (1 - prompts.range_ratio)))
        return rng.randint(low, math.ceil(length * (1 + prompts.range_ratio)))

    for name in names:
        prompter = prompters[name]
        tokens, output = around(prompts.input_len), around(prompts.output_len)
        prompt = prompter.make(tokens)
        if prompts.prefix_len:
            prefix = prefixes.setdefault(name, prompter.make(prompts.prefix_len))
            prompt = f"{prefix} {prompt}" if isinstance(prompt, str) else prefix + prompt
            tokens += prompts.prefix_len
        yield RequestInput(name, prompt, tokens, output)


def _texts(
    prompts: Prompts,
    prompters: Mapping[str, PromptGenerator],
    names: Sequence[str],
    rng: random.Random,
) -> Iterator[RequestInput]:
    assert prompts.path is not None
    entries = list(_sharegpt(prompts.path) if prompts.name == "sharegpt" else _custom(prompts.path))
    for name, (text, answer) in zip(names, _drawn(entries, prompts, rng), strict=False):
        prompter = prompters[name]
        tokens = prompter.count(text)
        if prompts.fixed_output is not None:
            output = prompts.fixed_output
        else:
            output = answer if isinstance(answer, int) else prompter.count(answer)
        yield RequestInput(name, text, max(1, tokens), max(1, output))


def _lengths_of(
    prompts: Prompts,
    prompters: Mapping[str, PromptGenerator],
    names: Sequence[str],
    rng: random.Random,
) -> Iterator[RequestInput]:
    assert prompts.path is not None
    entries = [(asked.prompt_tokens, asked.output_tokens) for asked in open_trace(prompts.path)]
    for name, (tokens, output) in zip(names, _drawn(entries, prompts, rng), strict=False):
        made = output if prompts.fixed_output is None else prompts.fixed_output
        yield RequestInput(name, prompters[name].make(tokens), tokens, made)


def _trace(
    prompts: Prompts,
    prompters: Mapping[str, PromptGenerator],
    names: Sequence[str],
    renamed: Mapping[str, str],
) -> Iterator[RequestInput]:
    assert prompts.path is not None
    for drawn, asked in zip(names, open_trace(prompts.path), strict=False):
        name = renamed.get(asked.model, asked.model) or drawn
        if name not in prompters:
            raise WorkloadError(
                f"the trace asks for {name}, which is not benchmarked; there are "
                f"{', '.join(prompters)}: map it to one of them (--map {name}=MODEL)"
            )
        output = asked.output_tokens if prompts.fixed_output is None else prompts.fixed_output
        prompt = prompters[name].make(asked.prompt_tokens)
        yield RequestInput(name, prompt, asked.prompt_tokens, output, asked.arrival)


def _drawn(entries: list[Any], prompts: Prompts, rng: random.Random) -> Iterator[Any]:
    if prompts.shuffle:
        rng.shuffle(entries)
    return itertools.cycle(entries) if prompts.oversample else iter(entries)


def _sharegpt(path: Path) -> Iterator[tuple[str, str]]:
    """First turns, within vLLM's limits by a rough count of four bytes a token."""
    data = _json(path)
    if not isinstance(data, list):
        raise BenchError(f"{path}: a ShareGPT file is a list of conversations")
    least, most_prompt, most = (4 * limit for limit in SHAREGPT_LIMITS)
    found = 0
    for index, entry in enumerate(data):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise BenchError(f"{path}: [{index}] has no list of conversations")
        if len(turns) < 2:
            continue
        try:
            prompt, answer = (str(turn["value"]) for turn in turns[:2])
        except (KeyError, TypeError) as error:
            raise BenchError(f"{path}: [{index}] has a turn without a text value") from error
        sizes = len(prompt.encode()), len(answer.encode())
        if min(sizes) >= least and sizes[0] <= most_prompt and sum(sizes) <= most:
            found += 1
            yield prompt, answer
    if not found:
        raise BenchError(f"{path}: no conversation of a usable length in it")


def _custom(path: Path) -> Iterator[tuple[str, int | str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: {error}") from error
    found = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(f'{path}:{number}: a line is {{"prompt": "..."}}') from error
        if not isinstance(prompt, str) or not prompt:
            raise BenchError(f"{path}:{number}: the prompt must be a text that is not empty")
        output = row.get("output_tokens", _DEFAULT_OUTPUT)
        if isinstance(output, bool) or not isinstance(output, int) or output < 1:
            raise BenchError(f"{path}:{number}: output_tokens must be a whole number above 0")
        found += 1
        yield prompt, output
    if not found:
        raise BenchError(f"{path}: no prompts in it")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BenchError(f"{path}: not JSON: {error}") from error
