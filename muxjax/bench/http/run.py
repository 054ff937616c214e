"""A benchmark of servers from the first look at them to the file of results."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from muxjax._version import __version__
from muxjax.bench.http.client import Backend, RequestInput, Server, list_models
from muxjax.bench.http.datasets import ArrivalPattern, Prompts, build_request_inputs, shares_of
from muxjax.bench.http.load import LoadResult, run_load
from muxjax.bench.http.metrics import Measures, summarize
from muxjax.bench.http.prompts import PromptGenerator, build_prompt_generator
from muxjax.errors import BenchError
from muxjax.progress import Bars

_BACKENDS: dict[str, Backend] = {
    "openai": "openai",
    "vllm": "openai",
    "openai-chat": "openai-chat",
}


def backend_of(name: str) -> Backend:
    """The backend of this name.

    Raises:
      BenchError: there is none.
    """
    if name not in _BACKENDS:
        raise BenchError(f"no backend {name!r}; there are {', '.join(_BACKENDS)}")
    return _BACKENDS[name]


@dataclass(frozen=True)
class HttpBench:
    """What to run.

    Attributes:
      server: where models are, unless they say another one.
      models: NAME or NAME@URL, most popular first; none: all that the server lists.
      alpha: power law of their popularity.
      prompts, pace, measures: what is asked, when, and what is reported.
      max_concurrency: requests under way at most.
      warm_ups: requests before the run.
      wait_seconds: how long to wait for the server to be there.
      tokenizer: a file that counts tokens.
      renamed: for traces, who serves a trace's model.
      label, metadata: for the result.

    Raises:
      BenchError: a number that cannot be.
    """

    server: Server
    models: Sequence[str] = ()
    alpha: float | None = None
    prompts: Prompts = field(default_factory=Prompts)
    pace: ArrivalPattern = field(default_factory=ArrivalPattern)
    measures: Measures = field(default_factory=Measures)
    max_concurrency: int | None = None
    warm_ups: int = 0
    wait_seconds: float = 0.0
    tokenizer: Path | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    label: str = "openai"
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise BenchError(f"--max-concurrency must be at least 1, not {self.max_concurrency}")
        if self.warm_ups < 0:
            raise BenchError(f"--num-warmups must not be negative, not {self.warm_ups}")
        if self.wait_seconds < 0:
            raise BenchError(
                f"--ready-check-timeout-sec must not be negative, not {self.wait_seconds:g}"
            )

    def run(self, *, progress: bool = True) -> tuple[dict[str, Any], LoadResult]:
        """Runs it.

        Returns:
          The result, with vLLM's keys, and what it is made from.

        Raises:
          BenchError, WorkloadError: what cannot be run.
        """
        _wait_for(self.server, self.wait_seconds)
        servers = self._servers()
        shares = shares_of(list(servers), self.alpha)
        with httpx.Client(timeout=30.0, verify=self.server.verify) as client:
            prompters = {
                name: build_prompt_generator(
                    client, server, name, seed=self.prompts.seed, tokenizer=self.tokenizer
                )
                for name, server in servers.items()
            }
            asks = build_request_inputs(self.prompts, self.pace, prompters, shares, self.renamed)
        _allow_connections(min(self.max_concurrency or len(asks), len(asks)))
        self._warm_up(servers, asks)
        with Bars({"requests": len(asks)}, show=progress) as bars:
            load = run_load(
                servers,
                asks,
                max_concurrency=self.max_concurrency,
                done=lambda outcome: bars.advance("requests", 1, outcome.ask.model),
            )
        return self._result(servers, prompters, load), load

    def _servers(self) -> dict[str, Server]:
        """Each model's server."""
        names = list(self.models) or asyncio.run(list_models(self.server))
        found: dict[str, Server] = {}
        for entry in names:
            name, mark, rest = entry.partition("@http")
            if not name:
                raise BenchError(f"--model is written NAME or NAME@http://..., not {entry!r}")
            if name in found:
                raise BenchError(f"--model {name} is given twice")
            found[name] = replace(self.server, url=f"http{rest}") if mark else self.server
        return found

    def _warm_up(self, servers: Mapping[str, Server], asks: Sequence[RequestInput]) -> None:
        """The first prompt of each model, in turn."""
        if not self.warm_ups:
            return
        firsts = list({ask.model: replace(ask, arrival=0.0) for ask in reversed(asks)}.values())
        load = run_load(
            servers,
            [firsts[index % len(firsts)] for index in range(self.warm_ups)],
            max_concurrency=self.max_concurrency,
        )
        if load.interrupted:
            raise KeyboardInterrupt
        for outcome in load.outcomes:
            if not outcome.success:
                raise BenchError(f"warming up {outcome.ask.model} failed: {outcome.error}")

    def _result(
        self,
        servers: Mapping[str, Server],
        prompters: Mapping[str, PromptGenerator],
        load: LoadResult,
    ) -> dict[str, Any]:
        return {
            "kind": "http",
            "version": __version__,
            "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
            "backend": self.server.backend,
            "endpoint_type": self.server.backend,
            "label": self.label,
            "model_id": ",".join(servers),
            "tokenizer_id": None if self.tokenizer is None else str(self.tokenizer),
            "servers": {name: server.api for name, server in servers.items()},
            "prompt_tokens_by": {name: prompter.how for name, prompter in prompters.items()},
            "dataset_name": self.prompts.name,
            "num_prompts": self.prompts.count,
            "seed": self.prompts.seed,
            "alpha": self.alpha,
            "request_rate": "inf" if math.isinf(self.pace.rate) else self.pace.rate,
            "burstiness": self.pace.burstiness,
            "max_concurrency": self.max_concurrency,
            **(
                {}
                if self.pace.ramp is None
                else {
                    "request_rate": None,
                    "ramp_up_strategy": self.pace.ramp,
                    "ramp_up_start_rps": self.pace.ramp_from,
                    "ramp_up_end_rps": self.pace.ramp_to,
                }
            ),
            "goodput": dict(self.measures.goodput),
            **self.metadata,
            **summarize(load, self.measures),
        }


def detailed(load: LoadResult) -> dict[str, Any]:
    """Every request's, under vLLM's keys; `models_asked` says who was asked."""
    outcomes = load.outcomes
    return {
        "models_asked": [outcome.ask.model for outcome in outcomes],
        "input_lens": [outcome.prompt_tokens for outcome in outcomes],
        "output_lens": [outcome.output_tokens for outcome in outcomes],
        "start_times": [outcome.sent for outcome in outcomes],
        "ttfts": [outcome.ttft for outcome in outcomes],
        "itls": [outcome.itl for outcome in outcomes],
        "latencies": [outcome.latency for outcome in outcomes],
        "queue_times": [outcome.queued for outcome in outcomes],
        "generated_texts": [outcome.text for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def saved_to(result: Mapping[str, Any], folder: Path | None, name: str | None) -> Path:
    """The result's file, named as vLLM names it unless there is a name."""
    if name is None:
        most = result["max_concurrency"]
        concurrency = "" if most is None else f"-concurrency{most}"
        models = result["model_id"].replace("/", "_").replace(",", "+")
        rate = result["request_rate"] or "ramp"
        name = f"{result['label']}-{rate}qps{concurrency}-{models}-{result['date']}.json"
    return (folder or Path()) / name


def write_result(
    result: Mapping[str, Any], load: LoadResult | None, path: Path, *, append: bool
) -> None:
    """Writes the file, or adds a line to it.

    Args:
      result: of the run.
      load: every request is written as well.
      path: the file.
      append: keep what the file holds.

    Raises:
      BenchError: it cannot be written.
    """
    whole = {**result, **({} if load is None else detailed(load))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror or error}") from error


def _wait_for(server: Server, seconds: float) -> None:
    """Until the server answers at all."""
    limit = time.monotonic() + seconds
    url = f"{server.base}/v1/models"
    while seconds:
        try:
            httpx.get(url, headers=dict(server.headers), timeout=5.0, verify=server.verify)
        except httpx.HTTPError as error:
            if time.monotonic() > limit:
                raise BenchError(
                    f"{url} did not answer within {seconds:g} s: {type(error).__name__}: {error}"
                ) from error
            time.sleep(0.2)
        else:
            return


def _allow_connections(count: int) -> None:
    """Raises the limit of open files, as far as the system lets a process do so."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            raise BenchError(
                f"{count} requests at once need as many open connections, and this system allows "
                f"{most} open files: use --max-concurrency, or raise the limit (ulimit -n)"
            )
