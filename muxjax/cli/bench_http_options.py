"""Options of `muxjax bench http`, with the names of vLLM's `bench serve`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from muxjax.errors import BenchError

SERVER, DATA, LOAD = "Server and models", "Data set", "Load"
SAMPLING, METRICS, RESULT = "Sampling", "Metrics", "Output"


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
        _option(
            SERVER, "The API: openai (or vllm) for completions, openai-chat for chat completions."
        ),
    ] = "openai"
    endpoint: Annotated[
        str | None, _option(SERVER, "The API's path. By default OpenAI's path for the backend.")
    ] = None
    header: Annotated[
        list[str] | None, _option(SERVER, "Send these headers, KEY=VALUE ..., with every request.")
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


@dataclass(frozen=True)
class DatasetOptions:
    """The prompts."""

    dataset_name: Annotated[
        str, _option(DATA, "The prompts: random, sharegpt, custom, burstgpt or trace.")
    ] = "random"
    dataset_path: Annotated[Path | None, _option(DATA, "The file of the data set.")] = None
    map: Annotated[
        list[str] | None,
        _option(
            DATA,
            "Serve a model of the trace with this model, TRACE=MODEL. May be repeated.",
        ),
    ] = None
    num_prompts: Annotated[int, _option(DATA, "Total number of requests.")] = 1000
    input_len: Annotated[int | None, _option(DATA, "The same as --random-input-len.")] = None
    output_len: Annotated[
        int | None, _option(DATA, "Output tokens of every request, whatever the data set.")
    ] = None
    random_input_len: Annotated[
        int | None, _option(DATA, "Tokens of each random prompt. [default: 1024]")
    ] = None
    random_output_len: Annotated[
        int | None,
        _option(DATA, "Output tokens of each request with a random prompt. [default: 128]"),
    ] = None
    random_range_ratio: Annotated[
        float,
        _option(DATA, "Lengths of random prompts and outputs vary uniformly by this fraction."),
    ] = 0.0
    random_prefix_len: Annotated[
        int, _option(DATA, "Tokens of a prefix that all random prompts of a model share.")
    ] = 0
    sharegpt_output_len: Annotated[
        int | None, _option(DATA, "The same as --output-len, for sharegpt.")
    ] = None
    custom_output_len: Annotated[
        int | None, _option(DATA, "The same as --output-len, for custom.")
    ] = None
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


@dataclass(frozen=True)
class LoadOptions:
    """When requests are sent."""

    request_rate: Annotated[
        float, _option(LOAD, "Requests per second; inf sends all at the start.")
    ] = math.inf
    burstiness: Annotated[
        float,
        _option(
            LOAD, "Regularity of the arrivals: 1 is a Poisson process; lower values are burstier."
        ),
    ] = 1.0
    ramp_up_strategy: Annotated[
        str | None, _option(LOAD, "Replace --request-rate by a ramp: linear or exponential.")
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


@dataclass(frozen=True)
class HttpSamplingOptions:
    """Sampling parameters of every request."""

    temperature: Annotated[
        float | None, _option(SAMPLING, "Temperature of sampling; 0 selects greedily.")
    ] = None
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
        """Returns the fields to add to the JSON of every request."""
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
            "Latency limits, METRIC:MS ... (ttft, tpot, e2el), that a request must meet to count "
            "as goodput.",
        ),
    ] = None
    percentile_metrics: Annotated[
        str, _option(METRICS, "Latencies to report, separated by commas.")
    ] = "ttft,tpot,itl,e2el"
    metric_percentiles: Annotated[
        str, _option(METRICS, "Percentiles to report, separated by commas.")
    ] = "99"


@dataclass(frozen=True)
class ResultOptions:
    """The output of a run, and the files to write."""

    disable_tqdm: Annotated[bool, _option(RESULT, "Do not show a progress bar.")] = False
    label: Annotated[
        str | None, _option(RESULT, "Name of the run. By default the backend's name.")
    ] = None
    metadata: Annotated[
        list[str] | None, _option(RESULT, "Store these values, KEY=VALUE ..., in the result.")
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
        str | None, _option(RESULT, "Name of the file. By default a name in vLLM's format.")
    ] = None

    @property
    def saves(self) -> bool:
        """Whether a file is written.

        Raises:
          BenchError: an option of the file is given without an option that writes it.
        """
        saves = self.save_result or self.append_result
        if (self.save_detailed or self.result_dir or self.result_filename) and not saves:
            raise BenchError(
                "--save-detailed, --result-dir and --result-filename need --save-result or "
                "--append-result"
            )
        return saves


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
