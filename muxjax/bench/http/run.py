"""Runs one benchmark of one or more servers and writes its result."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2

from muxjax._version import __version__
from muxjax.bench.http.client import Backend, RequestInput, Server, list_models
from muxjax.bench.http.datasets import ArrivalPattern, Prompts, build_request_inputs, model_shares
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


def parse_backend(name: str) -> Backend:
    """The backend for a value of `--backend`.

    Raises:
      BenchError: an unknown name.
    """
    if name not in _BACKENDS:
        raise BenchError(f"no backend {name!r}; there are {', '.join(_BACKENDS)}")
    return _BACKENDS[name]


@dataclass(frozen=True)
class HttpBench:
    """A benchmark over HTTP.

    Attributes:
      server: the server of models without an address.
      models: NAME or NAME@URL, most popular first; if empty, all models that the server lists.
      alpha: exponent of the power law of the models' popularity; None: equal popularity.
      prompts: the data set.
      arrivals: when requests are sent.
      measures: the metrics to report.
      max_concurrency: maximum number of running requests.
      warm_ups: number of requests before the measured run.
      wait_seconds: how long to wait for the server to answer.
      tokenizer: a tokenizer.json or its folder, to count tokens.
      model_map: maps a trace's model names to the server's.
      label, metadata: stored in the result.

    Raises:
      BenchError: a value out of range.
    """

    server: Server
    models: Sequence[str] = ()
    alpha: float | None = None
    prompts: Prompts = field(default_factory=Prompts)
    arrivals: ArrivalPattern = field(default_factory=ArrivalPattern)
    measures: Measures = field(default_factory=Measures)
    max_concurrency: int | None = None
    warm_ups: int = 0
    wait_seconds: float = 0.0
    tokenizer: Path | None = None
    model_map: Mapping[str, str] = field(default_factory=dict)
    label: str = "openai"
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise BenchError(f"--max-concurrency must be at least 1, not {self.max_concurrency}")
        if self.warm_ups < 0:
            raise BenchError(f"--num-warmups must be at least 0, not {self.warm_ups}")
        if self.wait_seconds < 0:
            raise BenchError(
                f"--ready-check-timeout-sec must be at least 0, not {self.wait_seconds:g}"
            )

    def run(self, *, progress: bool = True) -> tuple[dict[str, Any], LoadResult]:
        """Runs the benchmark.

        Returns:
          The result, with vLLM's keys, and the results of the individual requests.

        Raises:
          BenchError: a server that does not answer, or options that exclude each other.
          WorkloadError: a data set that cannot be used.
        """
        _wait_until_ready(self.server, self.wait_seconds)
        servers = self._servers()
        shares = model_shares(list(servers), self.alpha)
        with httpx2.Client(timeout=30.0, verify=self.server.verify) as client:
            generators = {
                name: build_prompt_generator(
                    client, server, name, seed=self.prompts.seed, tokenizer=self.tokenizer
                )
                for name, server in servers.items()
            }
            inputs = build_request_inputs(
                self.prompts, self.arrivals, generators, shares, self.model_map
            )
        _raise_open_file_limit(min(self.max_concurrency or len(inputs), len(inputs)))
        self._warm_up(servers, inputs)
        with Bars({"requests": len(inputs)}, show=progress) as bars:
            load = run_load(
                servers,
                inputs,
                max_concurrency=self.max_concurrency,
                on_result=lambda result: bars.advance("requests", 1, result.request.model),
            )
        return self._result(servers, generators, load), load

    def _servers(self) -> dict[str, Server]:
        """The server of each model."""
        names = list(self.models) or list_models(self.server)
        servers: dict[str, Server] = {}
        for entry in names:
            name, mark, rest = entry.partition("@http")
            if not name:
                raise BenchError(f"--model is written NAME or NAME@http://..., not {entry!r}")
            if name in servers:
                raise BenchError(f"--model {name} is given twice")
            servers[name] = replace(self.server, url=f"http{rest}") if mark else self.server
        return servers

    def _warm_up(self, servers: Mapping[str, Server], inputs: Sequence[RequestInput]) -> None:
        """Sends the first prompt of each model, round-robin."""
        if not self.warm_ups:
            return
        firsts = list(
            {request.model: replace(request, arrival=0.0) for request in reversed(inputs)}.values()
        )
        load = run_load(
            servers,
            [firsts[index % len(firsts)] for index in range(self.warm_ups)],
            max_concurrency=self.max_concurrency,
        )
        if load.interrupted:
            raise KeyboardInterrupt
        for result in load.results:
            if not result.success:
                raise BenchError(f"warming up {result.request.model} failed: {result.error}")

    def _result(
        self,
        servers: Mapping[str, Server],
        generators: Mapping[str, PromptGenerator],
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
            "prompt_tokens_by": {
                name: generator.counted_by for name, generator in generators.items()
            },
            "dataset_name": self.prompts.name,
            "num_prompts": self.prompts.count,
            "seed": self.prompts.seed,
            "alpha": self.alpha,
            "request_rate": "inf" if math.isinf(self.arrivals.rate) else self.arrivals.rate,
            "burstiness": self.arrivals.burstiness,
            "max_concurrency": self.max_concurrency,
            **(
                {}
                if self.arrivals.ramp is None
                else {
                    "request_rate": None,
                    "ramp_up_strategy": self.arrivals.ramp,
                    "ramp_up_start_rps": self.arrivals.ramp_from,
                    "ramp_up_end_rps": self.arrivals.ramp_to,
                }
            ),
            "goodput": dict(self.measures.goodput),
            **self.metadata,
            **summarize(load, self.measures),
        }


def detailed(load: LoadResult) -> dict[str, Any]:
    """The measurements of every request, under vLLM's keys, and `request_models`."""
    results = load.results
    return {
        "request_models": [result.request.model for result in results],
        "input_lens": [result.prompt_tokens for result in results],
        "output_lens": [result.output_tokens for result in results],
        "start_times": [result.sent for result in results],
        "ttfts": [result.ttft for result in results],
        "itls": [result.itl for result in results],
        "latencies": [result.latency for result in results],
        "queue_times": [result.queued for result in results],
        "generated_texts": [result.text for result in results],
        "errors": [result.error for result in results],
    }


def result_path(result: Mapping[str, Any], folder: Path | None, name: str | None) -> Path:
    """The path of the result; without a name, the file is named as vLLM names it."""
    if name is None:
        limit = result["max_concurrency"]
        concurrency = "" if limit is None else f"-concurrency{limit}"
        models = result["model_id"].replace("/", "_").replace(",", "+")
        rate = result["request_rate"] or "ramp"
        name = f"{result['label']}-{rate}qps{concurrency}-{models}-{result['date']}.json"
    return (folder or Path()) / name


def write_result(
    result: Mapping[str, Any], load: LoadResult | None, path: Path, *, append: bool
) -> None:
    """Writes the result as one line of JSON.

    Args:
      result: the result of the run.
      load: the measurements of every request, to include them.
      path: the file.
      append: append to the file instead of replacing it.

    Raises:
      BenchError: the file cannot be written.
    """
    content = {**result, **({} if load is None else detailed(load))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror or error}") from error


def _wait_until_ready(server: Server, seconds: float) -> None:
    """Waits until the server answers, with any status."""
    limit = time.monotonic() + seconds
    url = f"{server.base}/v1/models"
    while seconds:
        try:
            httpx2.get(url, headers=dict(server.headers), timeout=5.0, verify=server.verify)
        except httpx2.HTTPError as error:
            if time.monotonic() > limit:
                raise BenchError(
                    f"{url} did not answer within {seconds:g} s: {type(error).__name__}: {error}"
                ) from error
            time.sleep(0.2)
        else:
            return


def _raise_open_file_limit(count: int) -> None:
    """Raises this process's limit of open files so that `count` connections can be open."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            raise BenchError(
                f"{count} concurrent requests need as many open connections, but this system "
                f"allows only {allowed} open files: use --max-concurrency or raise the limit "
                f"(ulimit -n)"
            )
