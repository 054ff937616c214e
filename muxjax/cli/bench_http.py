"""`muxjax bench http`: load for any OpenAI-compatible server, several models in one run."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muxjax.cli.options import AsJson, GroupedCommand, register_command
from muxjax.errors import BenchError

if TYPE_CHECKING:
    from muxjax.bench.http.client import Server
    from muxjax.bench.http.datasets import ArrivalPattern, Prompts
    from muxjax.bench.http.load import LoadResult
    from muxjax.bench.http.metrics import Measures

SERVER, DATA, LOAD = "Server and models", "Data set", "Load"
SAMPLING, METRICS, RESULT = "Sampling", "Metrics", "Output"


class _VllmCommand(GroupedCommand):
    """Accepts options with several values, and refuses options of vLLM's that are unsupported."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from muxjax.bench.http.vllm_flags import expand_arguments

        return super().parse_args(ctx, expand_arguments(args))


def register(app: typer.Typer) -> None:
    """Adds the command."""
    register_command(app, http, command_class=_VllmCommand)


def _option(panel: str, help_text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **settings)


@dataclass(frozen=True)
class ServerOptions:
    """The server and its models."""

    base_url: Annotated[str | None, _option(SERVER, "The server's address.")] = None
    host: Annotated[str | None, _option(SERVER, "The server's host. [default: 127.0.0.1]")] = None
    port: Annotated[int | None, _option(SERVER, "The server's port. [default: 8000]")] = None
    backend: Annotated[
        str,
        _option(SERVER, "openai (or vllm) for completions, openai-chat for chat completions."),
    ] = "openai"
    endpoint: Annotated[
        str | None, _option(SERVER, "The API's path. By default OpenAI's path for the backend.")
    ] = None
    header: Annotated[
        list[str] | None, _option(SERVER, "KEY=VALUE ...: send these headers with every request.")
    ] = None
    insecure: Annotated[bool, _option(SERVER, "Accept any TLS certificate.")] = False
    ready_check_timeout_sec: Annotated[
        float, _option(SERVER, "Seconds to wait until the server answers; 0 does not wait.")
    ] = 0.0
    model: Annotated[
        list[str] | None,
        _option(
            SERVER,
            "A model, or NAME@URL for a model on another server. May be repeated, most popular "
            "first. By default all models that the server lists.",
        ),
    ] = None
    alpha: Annotated[
        float | None,
        _option(
            SERVER,
            "Exponent of the power law of the models' popularity. By default all models are "
            "equally popular.",
        ),
    ] = None

    def build(self, url: str | None, body: dict[str, Any]) -> Server:
        """The server, which `url` or these options name."""
        from muxjax.bench.http.client import Server
        from muxjax.bench.http.run import parse_backend
        from muxjax.bench.http.vllm_flags import pairs

        by_host = self.host is not None or self.port is not None
        if sum([url is not None, self.base_url is not None, by_host]) > 1:
            raise BenchError("give the server once: as URL, as --base-url, or as --host and --port")
        address = url or self.base_url or f"http://{self.host or '127.0.0.1'}:{self.port or 8000}"
        return Server(
            address,
            parse_backend(self.backend),
            self.endpoint,
            pairs(self.header, "--header"),
            body,
            verify=not self.insecure,
        )


@dataclass(frozen=True)
class DatasetOptions:
    """The prompts."""

    dataset_name: Annotated[str, _option(DATA, "random, sharegpt, custom, burstgpt or trace.")] = (
        "random"
    )
    dataset_path: Annotated[Path | None, _option(DATA, "The file of the data set.")] = None
    map: Annotated[
        list[str] | None,
        _option(
            DATA,
            "TRACE=MODEL: serve a model of the trace with this model. May be repeated.",
        ),
    ] = None
    num_prompts: Annotated[int, _option(DATA, "Total number of requests.")] = 1000
    input_len: Annotated[int | None, _option(DATA, "The same as --random-input-len.")] = None
    output_len: Annotated[
        int | None, _option(DATA, "Output tokens of every request, whatever the data set.")
    ] = None
    random_input_len: Annotated[
        int | None, _option(DATA, "random: tokens of each prompt. [default: 1024]")
    ] = None
    random_output_len: Annotated[
        int | None, _option(DATA, "random: output tokens of each request. [default: 128]")
    ] = None
    random_range_ratio: Annotated[
        float, _option(DATA, "random: lengths vary uniformly by this fraction.")
    ] = 0.0
    random_prefix_len: Annotated[
        int, _option(DATA, "random: tokens of a prefix that all prompts of a model share.")
    ] = 0
    sharegpt_output_len: Annotated[
        int | None, _option(DATA, "sharegpt: the same as --output-len.")
    ] = None
    custom_output_len: Annotated[int | None, _option(DATA, "custom: the same as --output-len.")] = (
        None
    )
    no_oversample: Annotated[
        bool, _option(DATA, "Send fewer requests if the file has too few, instead of repeating it.")
    ] = False
    disable_shuffle: Annotated[bool, _option(DATA, "Keep the order of the file.")] = False
    tokenizer: Annotated[
        str | None,
        _option(
            DATA,
            "A tokenizer.json, or its folder, to count tokens with. By default the server counts.",
        ),
    ] = None
    seed: Annotated[int, _option(DATA, "Seed of the prompts and of the arrivals.")] = 0

    def build(self) -> Prompts:
        """The data set."""
        from muxjax.bench.http.datasets import Prompts

        return Prompts(
            name=self.dataset_name,  # type: ignore[arg-type]  # checked there
            path=self.dataset_path,
            count=self.num_prompts,
            input_len=_first_given(self.input_len, self.random_input_len, 1024),
            output_len=_first_given(self.output_len, self.random_output_len, 128),
            range_ratio=self.random_range_ratio,
            prefix_len=self.random_prefix_len,
            fixed_output=self._fixed_output(),
            shuffle=not self.disable_shuffle,
            oversample=not self.no_oversample,
            seed=self.seed,
        )

    def _fixed_output(self) -> int | None:
        """Output tokens in place of the data set's."""
        fixed = self.output_len
        for option, value, owner in (
            ("--sharegpt-output-len", self.sharegpt_output_len, "sharegpt"),
            ("--custom-output-len", self.custom_output_len, "custom"),
        ):
            if value is None:
                continue
            if self.dataset_name != owner:
                raise BenchError(f"{option} is for --dataset-name {owner}, not {self.dataset_name}")
            fixed = value
        return fixed


@dataclass(frozen=True)
class LoadOptions:
    """When requests are sent."""

    request_rate: Annotated[
        float, _option(LOAD, "Requests per second; inf sends all at the start.")
    ] = math.inf
    burstiness: Annotated[
        float,
        _option(LOAD, "1 is a Poisson process; lower values are burstier, higher more regular."),
    ] = 1.0
    ramp_up_strategy: Annotated[
        str | None, _option(LOAD, "linear or exponential: replaces --request-rate.")
    ] = None
    ramp_up_start_rps: Annotated[
        float | None, _option(LOAD, "Requests per second at the start of the ramp.")
    ] = None
    ramp_up_end_rps: Annotated[
        float | None, _option(LOAD, "Requests per second at the end of the ramp.")
    ] = None
    max_concurrency: Annotated[
        int | None, _option(LOAD, "Maximum number of running requests over all models.")
    ] = None
    num_warmups: Annotated[int, _option(LOAD, "Requests before the measured run.")] = 0

    def build(self) -> ArrivalPattern:
        """The arrival pattern."""
        from muxjax.bench.http.datasets import ArrivalPattern

        if self.ramp_up_strategy not in (None, "linear", "exponential"):
            raise BenchError(
                f"--ramp-up-strategy is linear or exponential, not {self.ramp_up_strategy!r}"
            )
        return ArrivalPattern(
            self.request_rate,
            self.burstiness,
            self.ramp_up_strategy,  # type: ignore[arg-type]  # checked
            self.ramp_up_start_rps,
            self.ramp_up_end_rps,
        )


@dataclass(frozen=True)
class HttpSamplingOptions:
    """Sampling parameters of every request."""

    temperature: Annotated[float | None, _option(SAMPLING, "0 is greedy sampling.")] = None
    top_p: Annotated[float | None, _option(SAMPLING, "Nucleus sampling.")] = None
    top_k: Annotated[int | None, _option(SAMPLING, "Sample from the k most likely tokens.")] = None
    min_p: Annotated[
        float | None, _option(SAMPLING, "Minimum probability relative to the most likely token.")
    ] = None
    frequency_penalty: Annotated[
        float | None, _option(SAMPLING, "Penalty for each earlier occurrence of a token.")
    ] = None
    presence_penalty: Annotated[
        float | None, _option(SAMPLING, "Penalty for tokens that have occurred.")
    ] = None
    repetition_penalty: Annotated[
        float | None, _option(SAMPLING, "Factor on the logits of tokens that have occurred.")
    ] = None
    logprobs: Annotated[
        int | None, _option(SAMPLING, "Request this many alternatives for each token.")
    ] = None
    ignore_eos: Annotated[
        bool,
        _option(SAMPLING, "Generate the full output length. Always set for random prompts."),
    ] = False
    extra_body: Annotated[
        str | None, _option(SAMPLING, "A JSON object to add to every request.")
    ] = None

    def body(self, *, chat: bool, synthetic: bool) -> dict[str, Any]:
        """The fields to add to every request's JSON."""
        names = ("temperature", "top_p", "top_k", "min_p")
        penalties = ("frequency_penalty", "presence_penalty", "repetition_penalty")
        fields: dict[str, Any] = {
            name: getattr(self, name)
            for name in (*names, *penalties)
            if getattr(self, name) is not None
        }
        if self.logprobs is not None and chat:
            fields |= {"logprobs": True, "top_logprobs": self.logprobs}
        elif self.logprobs is not None:
            fields["logprobs"] = self.logprobs
        if self.ignore_eos or synthetic:
            fields["ignore_eos"] = True
        return {**fields, **_parse_json_object(self.extra_body)}


@dataclass(frozen=True)
class MetricOptions:
    """The metrics to report."""

    goodput: Annotated[
        list[str] | None,
        _option(
            METRICS,
            "METRIC:MS ...: latency limits (ttft, tpot, e2el) that a request must meet to count "
            "as goodput.",
        ),
    ] = None
    percentile_metrics: Annotated[
        str, _option(METRICS, "Latencies to report, separated by commas.")
    ] = "ttft,tpot,itl,e2el"
    metric_percentiles: Annotated[
        str, _option(METRICS, "Percentiles to report, separated by commas.")
    ] = "99"

    def build(self) -> Measures:
        """The metrics."""
        from muxjax.bench.http.metrics import Measures
        from muxjax.bench.http.vllm_flags import goodput

        try:
            percentiles = tuple(float(part) for part in self.metric_percentiles.split(","))
        except ValueError as error:
            raise BenchError(
                f"--metric-percentiles takes numbers with commas between, not "
                f"{self.metric_percentiles!r}"
            ) from error
        return Measures(
            tuple(self.percentile_metrics.split(",")), percentiles, goodput(self.goodput)
        )


@dataclass(frozen=True)
class ResultOptions:
    """What is printed and saved."""

    disable_tqdm: Annotated[bool, _option(RESULT, "Do not show a progress bar.")] = False
    label: Annotated[
        str | None, _option(RESULT, "Name of the run. By default the backend's name.")
    ] = None
    metadata: Annotated[
        list[str] | None, _option(RESULT, "KEY=VALUE ...: store these values in the result.")
    ] = None
    save_result: Annotated[bool, _option(RESULT, "Write the result to a file (JSON).")] = False
    save_detailed: Annotated[
        bool, _option(RESULT, "Include the times and texts of every request in the file.")
    ] = False
    append_result: Annotated[
        bool, _option(RESULT, "Append a line to the file instead of replacing it.")
    ] = False
    result_dir: Annotated[
        Path | None, _option(RESULT, "Folder of the file. [default: the current folder]")
    ] = None
    result_filename: Annotated[
        str | None, _option(RESULT, "Name of the file. By default as vLLM names it.")
    ] = None

    @property
    def saves(self) -> bool:
        """Whether a file is written.

        Raises:
          BenchError: options of the file without an option that writes it.
        """
        saves = self.save_result or self.append_result
        if (self.save_detailed or self.result_dir or self.result_filename) and not saves:
            raise BenchError(
                "--save-detailed, --result-dir and --result-filename need --save-result or "
                "--append-result"
            )
        return saves

    def write(self, result: dict[str, Any], load: LoadResult) -> None:
        """Writes the file."""
        from muxjax.bench.http.run import result_path, write_result

        path = result_path(result, self.result_dir, self.result_filename)
        details = load if self.save_detailed else None
        write_result(result, details, path, append=self.append_result)
        print(f"muxjax: written to {path}", file=sys.stderr)


def http(
    server: ServerOptions,
    data: DatasetOptions,
    load: LoadOptions,
    sampling: HttpSamplingOptions,
    metrics: MetricOptions,
    result: ResultOptions,
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL]", help="The server. Alternatively --base-url, or --host and --port."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load an OpenAI-compatible server as `vllm bench serve` does, with several models at once.

    Options and JSON keys are vLLM's. The result also has a block for each model, the SLO attainment
    and Jain's fairness index. Ctrl-C keeps finished requests.
    """
    from muxjax.bench.http.run import HttpBench, parse_backend
    from muxjax.bench.http.vllm_flags import pairs, tokenizer_path

    backend = parse_backend(server.backend)
    saves = result.saves
    prompts = data.build()
    body = sampling.body(chat=backend == "openai-chat", synthetic=prompts.synthetic)
    bench = HttpBench(
        server=server.build(url, body),
        models=server.model or [],
        alpha=server.alpha,
        prompts=prompts,
        arrivals=load.build(),
        measures=metrics.build(),
        max_concurrency=load.max_concurrency,
        warm_ups=load.num_warmups,
        wait_seconds=server.ready_check_timeout_sec,
        tokenizer=tokenizer_path(data.tokenizer),
        model_map=pairs(data.map, "--map"),
        label=result.label or backend,
        metadata=pairs(result.metadata, "--metadata"),
    )
    summary, measured = bench.run(progress=not result.disable_tqdm)
    if measured.interrupted:
        print(
            f"muxjax: interrupted; {len(measured.results)} requests were finished, "
            f"{measured.interrupted} are left out",
            file=sys.stderr,
        )
    if saves:
        result.write(summary, measured)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        from muxjax.bench.report.tables import show_http

        show_http(summary)
    _report_failures(measured)


def _report_failures(load: LoadResult) -> None:
    """Prints the first errors.

    Raises:
      BenchError: all requests failed.
    """
    failed = [result for result in load.results if not result.success]
    for result in failed[:5]:
        print(f"muxjax: {result.request.model}: {result.error}", file=sys.stderr)
    if len(failed) > 5:
        print(f"muxjax: and {len(failed) - 5} more failed requests", file=sys.stderr)
    if load.results and len(failed) == len(load.results):
        raise BenchError("all requests failed")


def _first_given(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _parse_json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise BenchError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BenchError("--extra-body must be a JSON object")
    return content
