"""`muxjax bench http`: load for any OpenAI-compatible server, several models in one run."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from muxjax.cli.bench_http_options import (
    DatasetOptions,
    HttpSamplingOptions,
    LoadOptions,
    MetricOptions,
    ResultOptions,
    ServerOptions,
)
from muxjax.cli.options import AsJson, GroupedCommand, register_command


class _VllmCommand(GroupedCommand):
    """Accepts options with several values, and rejects unsupported options of vLLM."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from muxjax.bench.http.vllm_flags import expand_arguments

        return super().parse_args(ctx, expand_arguments(args))


def register(app: typer.Typer) -> None:
    """Adds the command."""
    register_command(app, http, command_class=_VllmCommand)


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

    Options and JSON keys are those of vLLM. The result also has a section for each model, the SLO
    attainment and Jain's fairness index. Ctrl-C keeps finished requests.
    """
    from muxjax.bench.http.run import HttpBench, parse_backend
    from muxjax.bench.http.vllm_flags import pairs, tokenizer_path
    from muxjax.cli.bench_http_run import (
        build_arrivals,
        build_measures,
        build_prompts,
        build_server,
        report_failures,
        write_results,
    )

    backend = parse_backend(server.backend)
    saves = result.saves
    prompts = build_prompts(data)
    body = sampling.body(chat=backend == "openai-chat", synthetic=prompts.synthetic)
    bench = HttpBench(
        server=build_server(server, url, body),
        models=server.model or [],
        alpha=server.alpha,
        prompts=prompts,
        arrivals=build_arrivals(load),
        measures=build_measures(metrics),
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
        write_results(result, summary, measured)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        from muxjax.bench.report.tables import show_http

        show_http(summary)
    report_failures(measured)
