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
      sigma: spread of the lengths' logarithms; None: as ShareGPT's.
      seed: the same gives the same requests.
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
    asked: WorkloadOptions,
    renamed: Mapping[str, str] | None = None,
) -> list[TraceRequest]:
    """Builds all requests, in order of arrival.

    Args:
      config: the fleet file.
      limits: maximum sequence length of each model.
      asked: the workload.
      renamed: model of the fleet for each model name of a trace.

    Raises:
      WorkloadError: an invalid option, or options that exclude each other.
    """
    if asked.requests is not None and asked.requests < 1:
        raise WorkloadError(f"--requests must be at least 1, not {asked.requests}")
    if asked.seconds is not None and not asked.seconds > 0:
        raise WorkloadError(f"--duration must be above 0, not {asked.seconds}")
    if asked.kind in KINDS:
        if renamed:
            raise WorkloadError("--map is for traces; other workloads name the fleet's models")
        found = list(_synthetic(config, limits, asked))
    else:
        found = list(_trace(config, asked, renamed or {}))
    if not found:
        raise WorkloadError("the workload has no requests: make it longer, or raise its rate")
    return found


def fleet_rates(config: FleetConfig, asked: WorkloadOptions) -> dict[str, float]:
    """Requests per second of each model.

    Raises:
      WorkloadError: a negative rate or `alpha`.
    """
    rates = {entry.name: entry.rate for entry in config.models}
    total = sum(rates.values()) if asked.rate is None else asked.rate
    if asked.alpha is None:
        return {name: rate / sum(rates.values()) * total for name, rate in rates.items()}
    names = sorted(rates, key=lambda name: -rates[name])
    dealt = dict(zip(names, power_law_rates(len(names), asked.alpha, total=total), strict=True))
    return {name: dealt[name] for name in rates}


def _synthetic(
    config: FleetConfig, limits: Mapping[str, int], asked: WorkloadOptions
) -> SyntheticWorkload:
    for option, value, owner in (
        ("--cv", asked.cv, "gamma"),
        ("--on-off", asked.on_off, "bursts"),
        ("--change-points", asked.change_points, "drift"),
    ):
        if value is not None and asked.kind != owner:
            raise WorkloadError(f"{option} is for --workload {owner}, not {asked.kind}")
    seconds = asked.seconds
    if seconds is None and asked.requests is None:
        seconds = DEFAULT_SECONDS
    arrivals = ArrivalProcess()
    if asked.kind == "gamma":
        arrivals = ArrivalProcess(cv=4.0 if asked.cv is None else asked.cv)
    elif asked.kind == "bursts":
        arrivals = ArrivalProcess(on_off=asked.on_off or (10.0, 30.0))
    elif asked.kind == "drift":
        points = asked.change_points
        if points is None and seconds is None:
            raise WorkloadError("--workload drift needs --change-points or --duration")
        points = points or tuple(part / 4 * (seconds or 0.0) for part in (1, 2, 3))
        arrivals = ArrivalProcess(change_points=points)
    rates = fleet_rates(config, asked)
    traffic = []
    for entry in config.models:
        prompt = entry.prompt_tokens if asked.prompt_tokens is None else asked.prompt_tokens
        output = entry.output_tokens if asked.output_tokens is None else asked.output_tokens
        lengths = _lengths(entry.name, prompt, output, limits[entry.name], asked.sigma)
        traffic.append(Traffic(entry.name, rates[entry.name], lengths))
    return SyntheticWorkload(traffic, seconds, asked.requests, arrivals, asked.seed)


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
        raise WorkloadError(f"{name}, which holds {limit} tokens a request: {error}") from error


def _trace(
    config: FleetConfig, asked: WorkloadOptions, renamed: Mapping[str, str]
) -> TruncatedWorkload:
    for option, value in (
        ("--alpha", asked.alpha),
        ("--rate", asked.rate),
        ("--cv", asked.cv),
        ("--on-off", asked.on_off),
        ("--change-points", asked.change_points),
        ("--prompt-tokens", asked.prompt_tokens),
        ("--output-tokens", asked.output_tokens),
        ("--sigma", asked.sigma),
    ):
        if value is not None:
            raise WorkloadError(f"{option} is for synthetic workloads; {asked.kind} is a trace")
    path = Path(asked.kind)
    if not path.is_file():
        raise WorkloadError(
            f"no workload {asked.kind!r}: neither one of {', '.join(KINDS)} nor a trace file"
        )
    rates = {entry.name: entry.rate for entry in config.models}
    assigned = AssignedWorkload(open_trace(path), rates, renamed, asked.seed)
    return TruncatedWorkload(assigned, asked.requests, asked.seconds)
