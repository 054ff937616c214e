"""Builds the workload of a benchmark from a fleet's rates and lengths, or from a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from muxjax.config.fleet_file import FleetConfig
from muxjax.errors import WorkloadError
from muxjax.placement.workload.arrivals import power_law_rates
from muxjax.placement.workload.lengths import LogNormal
from muxjax.placement.workload.synthetic import (
    ArrivalProcess,
    AssignedWorkload,
    SyntheticWorkload,
    Traffic,
)
from muxjax.placement.workload.trace import TraceRequest, TruncatedWorkload
from muxjax.placement.workload.trace_files import open_trace

KINDS = ("poisson", "gamma", "bursts", "drift")
"""Synthetic workloads; any other value of `--workload` is a trace file."""
DEFAULT_SECONDS = 30.0


@dataclass(frozen=True)
class WorkloadOptions:
    """Options of a workload; None means the fleet file's value, or the default.

    Attributes:
      kind: one of `KINDS`, or the path of a trace.
      seconds: length of the workload.
      requests: maximum number of requests.
      alpha: exponent of the power law that divides the total rate, the most popular model first.
      rate: requests per second of all models.
      cv: coefficient of variation of the gaps between requests; `gamma` has 4 by default.
      on_off: mean seconds with requests and without, for `bursts`.
      change_points: seconds at which models swap rates, for `drift`; each quarter by default.
      prompt_tokens, output_tokens: means, for all models.
      sigma: spread of the lengths' logarithms; None: the spread of ShareGPT.
      seed: seed of the requests.
    """

    kind: str = "poisson"
    seconds: float | None = None
    requests: int | None = None
    alpha: float | None = None
    rate: float | None = None
    cv: float | None = None
    on_off: tuple[float, float] | None = None
    change_points: tuple[float, ...] | None = None
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    sigma: float | None = None
    seed: int = 0


def build_workload(
    config: FleetConfig,
    limits: Mapping[str, int],
    options: WorkloadOptions,
    model_map: Mapping[str, str] | None = None,
) -> list[TraceRequest]:
    """Builds all requests, in order of arrival.

    Args:
      config: the fleet file.
      limits: maximum sequence length of each model.
      options: the workload.
      model_map: model of the fleet for each model name of a trace.

    Raises:
      WorkloadError: an invalid option, or options that exclude each other.
    """
    if options.requests is not None and options.requests < 1:
        raise WorkloadError(f"--requests must be at least 1, not {options.requests}")
    if options.seconds is not None and not options.seconds > 0:
        raise WorkloadError(f"--duration must be above 0, not {options.seconds}")
    if options.kind in KINDS:
        if model_map:
            raise WorkloadError("--map is for traces; other workloads name the fleet's models")
        requests = list(_synthetic(config, limits, options))
    else:
        requests = list(_trace(config, options, model_map or {}))
    if not requests:
        raise WorkloadError("the workload has no requests: make it longer, or raise its rate")
    return requests


def fleet_rates(config: FleetConfig, options: WorkloadOptions) -> dict[str, float]:
    """Requests per second of each model.

    Raises:
      WorkloadError: a negative rate or `alpha`.
    """
    rates = {entry.name: entry.rate for entry in config.models}
    total = sum(rates.values()) if options.rate is None else options.rate
    if options.alpha is None:
        return {name: rate / sum(rates.values()) * total for name, rate in rates.items()}
    names = sorted(rates, key=lambda name: -rates[name])
    by_popularity = dict(
        zip(names, power_law_rates(len(names), options.alpha, total=total), strict=True)
    )
    return {name: by_popularity[name] for name in rates}


def _synthetic(
    config: FleetConfig, limits: Mapping[str, int], options: WorkloadOptions
) -> SyntheticWorkload:
    for option, value, owner in (
        ("--cv", options.cv, "gamma"),
        ("--on-off", options.on_off, "bursts"),
        ("--change-points", options.change_points, "drift"),
    ):
        if value is not None and options.kind != owner:
            raise WorkloadError(f"{option} is for --workload {owner}, not {options.kind}")
    seconds = options.seconds
    if seconds is None and options.requests is None:
        seconds = DEFAULT_SECONDS
    arrivals = ArrivalProcess()
    if options.kind == "gamma":
        arrivals = ArrivalProcess(cv=4.0 if options.cv is None else options.cv)
    elif options.kind == "bursts":
        arrivals = ArrivalProcess(on_off=options.on_off or (10.0, 30.0))
    elif options.kind == "drift":
        points = options.change_points
        if points is None and seconds is None:
            raise WorkloadError("--workload drift needs --change-points or --duration")
        points = points or tuple(part / 4 * (seconds or 0.0) for part in (1, 2, 3))
        arrivals = ArrivalProcess(change_points=points)
    rates = fleet_rates(config, options)
    traffic = []
    for entry in config.models:
        prompt = entry.prompt_tokens if options.prompt_tokens is None else options.prompt_tokens
        output = entry.output_tokens if options.output_tokens is None else options.output_tokens
        lengths = _lengths(entry.name, prompt, output, limits[entry.name], options.sigma)
        traffic.append(Traffic(entry.name, rates[entry.name], lengths))
    return SyntheticWorkload(traffic, seconds, options.requests, arrivals, options.seed)


def _lengths(name: str, prompt: float, output: float, limit: int, sigma: float | None) -> LogNormal:
    """Log-normal lengths; prompt and output divide the limit in proportion to their means."""
    if prompt < 1 or output < 1:
        raise WorkloadError(f"{name}: mean lengths must be at least 1 token, not {prompt}/{output}")
    part = prompt / (prompt + output)
    spread = {} if sigma is None else {"prompt_sigma": sigma, "output_sigma": sigma}
    try:
        return LogNormal(
            prompt,
            output,
            max_prompt=max(1, int(part * (limit - 1))),
            max_output=max(1, int((1 - part) * (limit - 1))),
            **spread,
        )
    except WorkloadError as error:
        raise WorkloadError(
            f"{name}, whose limit is {limit} tokens per request: {error}"
        ) from error


def _trace(
    config: FleetConfig, options: WorkloadOptions, model_map: Mapping[str, str]
) -> TruncatedWorkload:
    for option, value in (
        ("--alpha", options.alpha),
        ("--rate", options.rate),
        ("--cv", options.cv),
        ("--on-off", options.on_off),
        ("--change-points", options.change_points),
        ("--prompt-tokens", options.prompt_tokens),
        ("--output-tokens", options.output_tokens),
        ("--sigma", options.sigma),
    ):
        if value is not None:
            raise WorkloadError(f"{option} is for synthetic workloads; {options.kind} is a trace")
    path = Path(options.kind)
    if not path.is_file():
        raise WorkloadError(
            f"no workload {options.kind!r}: neither one of {', '.join(KINDS)} nor a trace file"
        )
    rates = {entry.name: entry.rate for entry in config.models}
    assigned = AssignedWorkload(open_trace(path), rates, model_map, options.seed)
    return TruncatedWorkload(assigned, options.requests, options.seconds)
