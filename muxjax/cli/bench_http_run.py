"""Builds the benchmark of `muxjax bench http` from its options, and reports its results."""

from __future__ import annotations

import sys
from typing import Any

from muxjax.bench.http.client import Server
from muxjax.bench.http.datasets import ArrivalPattern, Prompts
from muxjax.bench.http.load import LoadResult
from muxjax.bench.http.metrics import Measures
from muxjax.bench.http.run import parse_backend, result_path, write_result
from muxjax.bench.http.vllm_flags import goodput, pairs
from muxjax.cli.bench_http_options import (
    DatasetOptions,
    LoadOptions,
    MetricOptions,
    ResultOptions,
    ServerOptions,
)
from muxjax.errors import BenchError


def build_server(options: ServerOptions, url: str | None, body: dict[str, Any]) -> Server:
    """Returns the server that `url` or the options specify.

    Raises:
      BenchError: more than one of them specifies a server.
    """
    by_host = options.host is not None or options.port is not None
    if sum([url is not None, options.base_url is not None, by_host]) > 1:
        raise BenchError("give the server once: as URL, as --base-url, or as --host and --port")
    address = (
        url or options.base_url or f"http://{options.host or '127.0.0.1'}:{options.port or 8000}"
    )
    return Server(
        address,
        parse_backend(options.backend),
        options.endpoint,
        pairs(options.header, "--header"),
        body,
        verify=not options.insecure,
    )


def build_prompts(options: DatasetOptions) -> Prompts:
    """Returns the data set."""
    return Prompts(
        name=options.dataset_name,  # type: ignore[arg-type]  # checked there
        path=options.dataset_path,
        count=options.num_prompts,
        input_len=_first_given(options.input_len, options.random_input_len, 1024),
        output_len=_first_given(options.output_len, options.random_output_len, 128),
        range_ratio=options.random_range_ratio,
        prefix_len=options.random_prefix_len,
        fixed_output=_fixed_output(options),
        shuffle=not options.disable_shuffle,
        oversample=not options.no_oversample,
        seed=options.seed,
    )


def _fixed_output(options: DatasetOptions) -> int | None:
    """Returns the output tokens of every request; None for those of the data set."""
    fixed = options.output_len
    for option, value, owner in (
        ("--sharegpt-output-len", options.sharegpt_output_len, "sharegpt"),
        ("--custom-output-len", options.custom_output_len, "custom"),
    ):
        if value is None:
            continue
        if options.dataset_name != owner:
            raise BenchError(f"{option} is for --dataset-name {owner}, not {options.dataset_name}")
        fixed = value
    return fixed


def build_arrivals(options: LoadOptions) -> ArrivalPattern:
    """Returns the arrival pattern."""
    if options.ramp_up_strategy not in (None, "linear", "exponential"):
        raise BenchError(
            f"--ramp-up-strategy is linear or exponential, not {options.ramp_up_strategy!r}"
        )
    return ArrivalPattern(
        options.request_rate,
        options.burstiness,
        options.ramp_up_strategy,  # type: ignore[arg-type]  # checked
        options.ramp_up_start_rps,
        options.ramp_up_end_rps,
    )


def build_measures(options: MetricOptions) -> Measures:
    """Returns the metrics to report."""
    try:
        percentiles = tuple(float(part) for part in options.metric_percentiles.split(","))
    except ValueError as error:
        raise BenchError(
            f"--metric-percentiles takes comma-separated numbers, not "
            f"{options.metric_percentiles!r}"
        ) from error
    return Measures(
        tuple(options.percentile_metrics.split(",")), percentiles, goodput(options.goodput)
    )


def write_results(options: ResultOptions, result: dict[str, Any], load: LoadResult) -> None:
    """Writes the result file that the options specify."""
    path = result_path(result, options.result_dir, options.result_filename)
    details = load if options.save_detailed else None
    write_result(result, details, path, append=options.append_result)
    print(f"muxjax: written to {path}", file=sys.stderr)


def _first_given(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def report_failures(load: LoadResult) -> None:
    """Prints the first errors on standard error.

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
