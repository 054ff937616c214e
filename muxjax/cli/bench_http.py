"""`muxjax bench http`: load for any OpenAI-compatible server, several models in one run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from muxjax.errors import BenchError


class _Command(TyperCommand):
    """Takes options with several values, and refuses those of vLLM's that there are not."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from muxjax.bench.http.vllm_flags import prepare

        return super().parse_args(ctx, prepare(args))


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(cls=_Command)(http)


def http(
    url: Annotated[
        str | None,
        typer.Argument(metavar="[URL]", help="The server; or --base-url, or --host and --port."),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="The server.")] = None,
    host: Annotated[str | None, typer.Option(help="The server's. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="The server's. [default: 8000]")] = None,
    backend: Annotated[
        str, typer.Option(help="openai (also: vllm) for completions, openai-chat for chats.")
    ] = "openai",
    endpoint: Annotated[
        str | None, typer.Option(help="Path of the API; by default OpenAI's of the backend.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated, most popular first; NAME@URL for one on another server. By "
            "default all that the server lists."
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Power law of the models' popularity; without it all get as much."),
    ] = None,
    dataset_name: Annotated[
        str, typer.Option(help="random, sharegpt, custom, burstgpt, or trace.")
    ] = "random",
    dataset_path: Annotated[Path | None, typer.Option(help="The data set's file.")] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option("--map", help="TRACE=MODEL: who serves a trace's model; may be repeated."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Requests in all.")] = 1000,
    input_len: Annotated[int | None, typer.Option(help="As --random-input-len.")] = None,
    output_len: Annotated[
        int | None, typer.Option(help="Output tokens, whatever the data set says.")
    ] = None,
    random_input_len: Annotated[int | None, typer.Option(help="[default: 1024]")] = None,
    random_output_len: Annotated[int | None, typer.Option(help="[default: 128]")] = None,
    random_range_ratio: Annotated[
        float, typer.Option(help="Lengths are this part shorter or longer, evenly.")
    ] = 0.0,
    random_prefix_len: Annotated[
        int, typer.Option(help="Tokens that all prompts of a model begin with.")
    ] = 0,
    sharegpt_output_len: Annotated[int | None, typer.Option(help="As --output-len.")] = None,
    custom_output_len: Annotated[int | None, typer.Option(help="As --output-len.")] = None,
    no_oversample: Annotated[
        bool, typer.Option("--no-oversample", help="Fewer requests where the file has fewer.")
    ] = False,
    disable_shuffle: Annotated[
        bool, typer.Option("--disable-shuffle", help="In the file's order.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, or its folder; else the server counts.")
    ] = None,
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf: all at once.")] = (
        math.inf
    ),
    burstiness: Annotated[
        float, typer.Option(help="1 is Poisson; less is burstier, more is more even.")
    ] = 1.0,
    ramp_up_strategy: Annotated[
        str | None, typer.Option(help="linear or exponential, in place of --request-rate.")
    ] = None,
    ramp_up_start_rps: Annotated[float | None, typer.Option(help="Where the ramp begins.")] = None,
    ramp_up_end_rps: Annotated[float | None, typer.Option(help="Where it ends.")] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests under way at most, of all models.")
    ] = None,
    num_warmups: Annotated[int, typer.Option(help="Requests before the run.")] = 0,
    ready_check_timeout_sec: Annotated[
        float, typer.Option(help="Seconds to wait for the server; 0: it is there.")
    ] = 0.0,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Outputs go on to their full length; always if random."),
    ] = False,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    frequency_penalty: Annotated[float | None, typer.Option()] = None,
    presence_penalty: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    logprobs: Annotated[int | None, typer.Option(help="Alternatives for each token.")] = None,
    extra_body: Annotated[str | None, typer.Option(help="JSON, added to every request.")] = None,
    header: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE ...: sent with every request.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Take any certificate.")] = False,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="METRIC:MS ...: limits of ttft, tpot, e2el that count as served."),
    ] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Of ttft, tpot, itl, e2el, with commas.")
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="With commas.")] = "99",
    seed: Annotated[int, typer.Option()] = 0,
    disable_tqdm: Annotated[bool, typer.Option("--disable-tqdm", help="No progress bar.")] = False,
    label: Annotated[
        str | None, typer.Option(help="Name of the run; by default the backend's.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE ...: kept in the result.")
    ] = None,
    save_result: Annotated[
        bool, typer.Option("--save-result", help="Write the result (JSON).")
    ] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="With it, every request's times and text.")
    ] = False,
    append_result: Annotated[
        bool, typer.Option("--append-result", help="Add a line to the file instead.")
    ] = False,
    result_dir: Annotated[Path | None, typer.Option(help="[default: here]")] = None,
    result_filename: Annotated[str | None, typer.Option()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Load an OpenAI-compatible server as `vllm bench serve` does, with several models at once.

    Options and JSON keys are vLLM's; there are also blocks for each model, `slo_attainment` and
    `jain_index`. Ctrl-C keeps what is finished.
    """
    from muxjax.bench.http.client import Server
    from muxjax.bench.http.datasets import ArrivalPattern, Prompts
    from muxjax.bench.http.metrics import Measures
    from muxjax.bench.http.run import HttpBench, parse_backend, result_path, write_result
    from muxjax.bench.http.vllm_flags import goodput as limits_of
    from muxjax.bench.http.vllm_flags import pairs, tokenizer_path

    kind = parse_backend(backend)
    if ramp_up_strategy not in (None, "linear", "exponential"):
        raise BenchError(f"--ramp-up-strategy is linear or exponential, not {ramp_up_strategy!r}")
    saving = save_result or append_result
    if (save_detailed or result_dir or result_filename) and not saving:
        raise BenchError(
            "--save-detailed, --result-dir and --result-filename need --save-result or "
            "--append-result"
        )
    measures = Measures(
        tuple(percentile_metrics.split(",")), _floats(metric_percentiles), limits_of(goodput)
    )
    prompts = Prompts(
        name=dataset_name,  # type: ignore[arg-type]  # checked there
        path=dataset_path,
        count=num_prompts,
        input_len=_first(input_len, random_input_len, 1024),
        output_len=_first(output_len, random_output_len, 128),
        range_ratio=random_range_ratio,
        prefix_len=random_prefix_len,
        fixed_output=_fixed_output(
            dataset_name, output_len, sharegpt_output_len, custom_output_len
        ),
        shuffle=not disable_shuffle,
        oversample=not no_oversample,
        seed=seed,
    )
    pace = ArrivalPattern(
        request_rate,
        burstiness,
        ramp_up_strategy,  # type: ignore[arg-type]  # checked
        ramp_up_start_rps,
        ramp_up_end_rps,
    )
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "repetition_penalty": repetition_penalty,
    }
    body: dict[str, Any] = {key: value for key, value in sampling.items() if value is not None}
    if logprobs is not None and kind == "openai-chat":
        body |= {"logprobs": True, "top_logprobs": logprobs}
    elif logprobs is not None:
        body["logprobs"] = logprobs
    if ignore_eos or prompts.synthetic:
        body["ignore_eos"] = True
    bench = HttpBench(
        server=Server(
            _address(url, base_url, host, port),
            kind,
            endpoint,
            pairs(header, "--header"),
            {**body, **_json_object(extra_body)},
            verify=not insecure,
        ),
        models=model or [],
        alpha=alpha,
        prompts=prompts,
        pace=pace,
        measures=measures,
        max_concurrency=max_concurrency,
        warm_ups=num_warmups,
        wait_seconds=ready_check_timeout_sec,
        tokenizer=tokenizer_path(tokenizer),
        renamed=pairs(rename, "--map"),
        label=label or kind,
        metadata=pairs(metadata, "--metadata"),
    )
    result, load = bench.run(progress=not disable_tqdm)
    if load.interrupted:
        print(
            f"muxjax: interrupted; {len(load.results)} requests were finished, "
            f"{load.interrupted} are left out",
            file=sys.stderr,
        )
    if saving:
        path = result_path(result, result_dir, result_filename)
        write_result(result, load if save_detailed else None, path, append=append_result)
        print(f"muxjax: written to {path}", file=sys.stderr)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        from muxjax.bench.report.tables import show_http

        show_http(result)
    failed = [result for result in load.results if not result.success]
    for result in failed[:5]:
        print(f"muxjax: {result.request.model}: {result.error}", file=sys.stderr)
    if len(failed) > 5:
        print(f"muxjax: and {len(failed) - 5} more that failed", file=sys.stderr)
    if load.results and len(failed) == len(load.results):
        raise BenchError("all requests failed")


def _address(url: str | None, base_url: str | None, host: str | None, port: int | None) -> str:
    """The server's, given in one of three ways."""
    given = [url is not None, base_url is not None, host is not None or port is not None]
    if sum(given) > 1:
        raise BenchError("give the server once: as URL, as --base-url, or as --host and --port")
    return url or base_url or f"http://{host or '127.0.0.1'}:{port or 8000}"


def _first(*values: int | None) -> int:
    """The first that is given."""
    return next(value for value in values if value is not None)


def _fixed_output(
    name: str, every: int | None, sharegpt: int | None, custom: int | None
) -> int | None:
    """Output tokens in place of what the data set says."""
    for option, value, owner in (
        ("--sharegpt-output-len", sharegpt, "sharegpt"),
        ("--custom-output-len", custom, "custom"),
    ):
        if value is not None and name != owner:
            raise BenchError(f"{option} is for --dataset-name {owner}, not {name}")
    own = {"sharegpt": sharegpt, "custom": custom}.get(name)
    return every if own is None else own


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BenchError(
            f"--metric-percentiles takes numbers with commas between, not {text!r}"
        ) from error


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BenchError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BenchError("--extra-body must be a JSON object")
    return found
