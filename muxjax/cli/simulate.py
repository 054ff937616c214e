"""`muxjax simulate`: simulates a plan under several policies and rates."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from muxjax.cli.options import (
    WORKLOAD_PANEL,
    ArrivalOptions,
    AsJson,
    ModelMap,
    OutputFolder,
    SloOptions,
    Trace,
    parse_model_map,
    parse_numbers,
    register_command,
)
from muxjax.cli.plan import PLAN_PANEL, Cluster, MuxServe, Profile
from muxjax.cli.trace import recorded_timeline
from muxjax.errors import PlanError, WorkloadError

if TYPE_CHECKING:
    from muxjax.placement.planner.plan import Execution, PlacementPlan
    from muxjax.placement.simulator.simulated_units import SystemConfig
    from muxjax.placement.simulator.simulation import SimulationSetup
    from muxjax.placement.workload.synthetic import ArrivalProcess
    from muxjax.placement.workload.trace import Workload
    from muxjax.placement.workload.trace_files import TraceFile
    from muxjax.scheduling.specs import LatencySlo
    from muxjax.scheduling.timeline import Timeline

KINDS = ("poisson", "gamma", "bursts", "drift")
"""Synthetic workloads; any other value of `--workload` is a trace file."""


@dataclass(frozen=True)
class PlanOptions:
    """How `simulate` makes a plan when it is given a fleet."""

    muxserve: MuxServe = None
    cluster: Cluster = None
    profile: Profile = None
    execution: Annotated[
        str | None,
        typer.Option(
            help="time_sliced or concurrent. By default what the plan was made for.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = None


@dataclass(frozen=True)
class SimulateLengthOptions:
    """Length and token counts of a workload, for `simulate`."""

    seconds: Annotated[
        float | None,
        typer.Option(
            help="Length of the workload in seconds; 120 if it has no other end.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    lengths: Annotated[
        Path | None,
        typer.Option(
            help="Draw the lengths of all models from this ShareGPT file (JSON).",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Count the tokens of --lengths with this tokenizer.json. By default four bytes "
            "count as a token.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    rate_scales: Annotated[
        str,
        typer.Option(
            help="Run the workload at each of these multiples of its rate.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = "0.5,1,1.5,2"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    register_command(app, simulate, panel="Plan and measure")


def simulate(
    plan_options: PlanOptions,
    workload: ArrivalOptions,
    lengths: SimulateLengthOptions,
    slo: SloOptions,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="PLAN|FLEET", help="A plan (JSON), or a fleet to plan first."),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="Policies, separated by commas: slo, adbs, fcfs, round_robin, static, temporal, "
            "spatial, mutex."
        ),
    ] = "adbs",
    max_waiting: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of waiting requests of a model; more are rejected. By default "
            "there is no limit."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the workload, and of the plan if one is made.")
    ] = 0,
    rename: ModelMap = None,
    trace: Trace = None,
    output: OutputFolder = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a plan with the real scheduler on a simulated clock."""
    from muxjax.placement.simulator.metrics import AttainmentCriterion
    from muxjax.placement.simulator.plan_costs import plan_costs, plan_criteria
    from muxjax.placement.simulator.simulation import SimulationSetup, validate_scales
    from muxjax.scheduling.specs import DEFAULT_SCALE

    scales = validate_scales(_numbers(lengths.rate_scales, "--rate-scales"))
    execution = plan_options.execution
    if execution is not None:
        _systems(policy, execution)  # checked before a long search
    plan, slos = _load_or_make_plan(file, plan_options, seed)
    systems = _systems(policy, execution or plan.execution)
    costs = plan_costs(plan)
    if not slo.is_default:
        slos = {}
    scale = DEFAULT_SCALE if slo.is_default else slo.scale
    targets = plan_criteria(
        plan, costs, AttainmentCriterion.from_targets(slo.ttft, slo.tpot, scale), slos
    )
    _check_limits(workload, lengths, max_waiting)
    described: dict[str, Any] = {
        "workload": workload.workload,
        "seconds": lengths.seconds,
        "requests": workload.requests,
        "cv": workload.cv,
        "on_off": workload.on_off,
        "change_points": workload.change_points,
        "alpha": workload.alpha,
        "rate": workload.rate,
        "lengths": None if lengths.lengths is None else str(lengths.lengths),
        "map": rename,
    }
    source, trace_file = _build_workload(plan, workload, lengths, rename, seed)
    last: float | None = None
    for request in source:  # reports a trace that is out of order before the first run
        last = request.arrival
    if last is None:
        raise WorkloadError("the workload has no requests: make it longer, or raise its rate")
    if trace_file is not None and trace_file.left_out:
        described["left_out"] = trace_file.left_out
        print(
            f"muxjax: {trace_file.left_out} failed requests of {workload.workload} left out",
            file=sys.stderr,
        )
    setup = SimulationSetup(plan, costs, targets, max_waiting, seed, described)
    # Without a limit on requests, a synthetic workload has the same length at any rate.
    fixed = trace_file is None and workload.requests is None
    with recorded_timeline(trace) as timeline:
        policies = _run_all(setup, systems, source, last, fixed, scales, output, timeline)
    report = {
        "seed": seed,
        "config_hash": policies[0]["config_hash"],
        "version": policies[0]["version"],
        "workload": described,
        "targets": {name: target.to_json() for name, target in targets.items()},
        "policies": policies,
    }
    if output is not None:
        _write(report, output)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    _show(policies)


def _check_limits(
    workload: ArrivalOptions, lengths: SimulateLengthOptions, max_waiting: int | None
) -> None:
    if max_waiting is not None and max_waiting < 1:
        raise WorkloadError(f"--max-waiting must be at least 1, not {max_waiting}")
    if workload.requests is not None and workload.requests < 1:
        raise WorkloadError(f"--requests must be at least 1, not {workload.requests}")
    if lengths.seconds is not None and not lengths.seconds > 0:
        raise WorkloadError(f"--seconds must be above 0, not {lengths.seconds}")


def _build_workload(
    plan: PlacementPlan,
    workload: ArrivalOptions,
    lengths: SimulateLengthOptions,
    rename: Sequence[str] | None,
    seed: int,
) -> tuple[Workload, TraceFile | None]:
    """The workload, and the trace file that it was read from."""
    from muxjax.placement.workload.trace import TruncatedWorkload
    from muxjax.placement.workload.trace_files import open_trace

    kind = workload.workload
    if kind in KINDS:
        if rename:
            raise WorkloadError("--map is for traces; a synthetic workload names the plan's models")
        return _synthetic(plan, workload, lengths, seed), None
    for option, value in (
        ("--cv", workload.cv),
        ("--on-off", workload.on_off),
        ("--change-points", workload.change_points),
        ("--alpha", workload.alpha),
        ("--rate", workload.rate),
        ("--lengths", lengths.lengths),
        ("--tokenizer", lengths.tokenizer),
    ):
        if value is not None:
            raise WorkloadError(f"{option} is for synthetic workloads; {kind} is a trace")
    if not Path(kind).is_file():
        raise WorkloadError(
            f"no workload {kind!r}: neither one of {', '.join(KINDS)} nor a trace file"
        )
    trace_file = open_trace(Path(kind))
    assigned = _assigned(plan, trace_file, rename or [], seed)
    return TruncatedWorkload(assigned, workload.requests, lengths.seconds), trace_file


def _load_or_make_plan(
    file: Path | None, options: PlanOptions, seed: int
) -> tuple[PlacementPlan, dict[str, LatencySlo]]:
    """The plan, and the latency targets of the fleet file that it is made from."""
    from muxjax.placement.planner.plan import load_plan
    from muxjax.placement.planner.planner import PlannerOptions

    if file is not None and file.suffix.lower() == ".json":
        for option, value in (
            ("--muxserve", options.muxserve),
            ("--cluster", options.cluster),
            ("--profile", options.profile),
        ):
            if value is not None:
                raise PlanError(f"{option} is for making a plan; {file} is one already")
        return load_plan(file), {}

    from muxjax.cli.plan import read_fleet, search_plan
    from muxjax.units.plan_inputs import plan_inputs

    fleet = read_fleet(file, options.muxserve)
    inputs = plan_inputs(fleet, cluster=options.cluster, profile=options.profile)
    chosen: Execution = inputs.execution if options.execution is None else options.execution  # type: ignore[assignment]  # checked
    plan = search_plan(inputs, PlannerOptions(execution=chosen, seed=seed))
    slos = {
        load.name: load.slo
        for load in inputs.loads
        if load.slo.ttft is not None or load.slo.tpot is not None
    }
    return plan, slos


def _systems(policies: str, execution: str) -> list[SystemConfig]:
    from muxjax.placement.planner.plan import Execution
    from muxjax.placement.simulator.simulated_units import SystemConfig, simulated_policy_names

    if execution not in get_args(Execution):
        raise PlanError(f"no execution {execution!r}; there are {', '.join(get_args(Execution))}")
    known = simulated_policy_names()
    names = [name.strip() for name in policies.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise PlanError(f"no policy {name!r}; there are {', '.join(known)}")
    if not names or len(set(names)) < len(names):
        raise PlanError(f"--policy must name policies, each once, not {policies!r}")
    return [SystemConfig(name, execution) for name in names]  # type: ignore[arg-type]  # checked


def _synthetic(
    plan: PlacementPlan, workload: ArrivalOptions, lengths: SimulateLengthOptions, seed: int
) -> Workload:
    from muxjax.placement.simulator.planned_workload import planned_traffic
    from muxjax.placement.workload.synthetic import SyntheticWorkload

    kind, seconds = workload.workload, lengths.seconds
    for option, value, owner in (
        ("--cv", workload.cv, "gamma"),
        ("--on-off", workload.on_off, "bursts"),
        ("--change-points", workload.change_points, "drift"),
    ):
        if value is not None and kind != owner:
            raise WorkloadError(f"{option} is for --workload {owner}, not {kind}")
    if lengths.tokenizer is not None and lengths.lengths is None:
        raise WorkloadError("--tokenizer counts the tokens of --lengths, which is missing")
    if seconds is None and workload.requests is None:
        seconds = 120.0
    traffic = planned_traffic(
        plan,
        alpha=workload.alpha,
        rate=workload.rate,
        pairs=_length_pairs(lengths.lengths, lengths.tokenizer),
    )
    return SyntheticWorkload(
        traffic, seconds, workload.requests, _arrivals(workload, seconds), seed
    )


def _arrivals(workload: ArrivalOptions, seconds: float | None) -> ArrivalProcess:
    """The arrival process of a synthetic workload."""
    from muxjax.placement.workload.synthetic import ArrivalProcess

    kind = workload.workload
    if kind == "gamma":
        return ArrivalProcess(cv=4.0 if workload.cv is None else workload.cv)
    if kind == "bursts":
        return ArrivalProcess(on_off=workload.parsed_on_off() or (10.0, 30.0))
    if kind != "drift":
        return ArrivalProcess()
    points = parse_numbers(workload.change_points, "--change-points")
    if points is None:
        if seconds is None:
            raise WorkloadError("--workload drift needs --change-points or --seconds")
        points = tuple(part / 4 * seconds for part in (1, 2, 3))
    return ArrivalProcess(change_points=points)


def _length_pairs(lengths: Path | None, tokenizer: Path | None) -> Sequence[tuple[int, int]] | None:
    from muxjax.placement.workload.sharegpt import approximate_tokens, sharegpt_lengths

    if lengths is None:
        return None
    if tokenizer is None:
        return sharegpt_lengths(lengths, approximate_tokens)
    from tokenizers import Tokenizer

    if not tokenizer.is_file():
        raise WorkloadError(f"{tokenizer}: no such file")
    counter = Tokenizer.from_file(str(tokenizer))
    return sharegpt_lengths(
        lengths, lambda text: len(counter.encode(text, add_special_tokens=False))
    )


def _assigned(plan: PlacementPlan, trace: TraceFile, rename: Sequence[str], seed: int) -> Workload:
    from muxjax.placement.simulator.planned_workload import planned_rates
    from muxjax.placement.workload.synthetic import AssignedWorkload

    return AssignedWorkload(trace, planned_rates(plan), parse_model_map(rename), seed)


def _run_all(
    setup: SimulationSetup,
    systems: Sequence[SystemConfig],
    workload: Workload,
    last: float,
    fixed: bool,
    scales: Sequence[float],
    output: Path | None,
    timeline: Timeline | None,
) -> list[dict[str, Any]]:
    """Runs all policies at all rates, with a progress bar for each policy.

    Args:
      setup: what all runs share.
      systems: policies to compare.
      workload: the workload at scale 1.
      last: its last arrival, for the progress bars.
      fixed: whether its length is the same at any rate.
      scales: multiples of the rate.
      output: folder for the records of each run; None writes none.
      timeline: records the steps of all runs.
    """
    from muxjax.placement.simulator.output_files import record_file
    from muxjax.placement.simulator.simulation import run_simulation, sweep_rates
    from muxjax.progress import Bars

    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    steps = 1000
    totals: dict[str, int] = {system.policy: steps * len(scales) for system in systems}
    with Bars(totals, show=True) as bars:

        def run_one(system: SystemConfig, scale: float, scaled: Workload) -> dict[str, Any]:
            done = 0
            end = last if fixed else last / scale

            def progress(arrival: float) -> None:
                nonlocal done
                now = int(steps * min(1.0, arrival / end)) if end else steps
                bars.advance(system.policy, now - done, f"rate x {scale:.3g}")
                done = now

            with ExitStack() as stack:
                record = None
                if output is not None:
                    record = stack.enter_context(record_file(output, system.policy, scale))
                result = run_simulation(
                    setup,
                    system,
                    scaled,
                    on_record=record,
                    progress=progress,
                    timeline=timeline,
                    title=f"{system.policy}, rate x {scale:.3g}:",
                )
            progress(end)
            return result

        return sweep_rates(setup, systems, workload, scales, run=run_one)


def _write(report: Mapping[str, Any], output: Path) -> None:
    from muxjax.placement.simulator.output_files import write_json, write_plots, write_tables

    write_json(report, output / "simulation.json")
    write_tables(report["policies"], output)
    try:
        write_plots(report["policies"], output)
    except ImportError:
        print("muxjax: no plots; they need matplotlib: pip install 'muxjax[plot]'", file=sys.stderr)


def _show(policies: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="simulated", caption="rates and throughputs in requests/s, latencies in s")
    columns = ("policy", "rate", "served", "weighted", "goodput", "attainment")
    for column in (*columns, "TTFT p99", "TPOT p99", "rejected"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for policy in policies:
        for run in policy["runs"]:
            table.add_row(
                policy["policy"],
                _shown(run["offered_rate"]),
                _shown(run["total_throughput"]),
                _shown(run["rate_weighted_throughput"]),
                _shown(run["request_goodput"]),
                f"{run['slo_attainment']:.1%}",
                _shown(run["ttft_s"]["p99"]),
                _shown(run["tpot_s"]["p99"]),
                str(run["rejected"] + run["failed"]),
            )
        table.add_section()
    console = Console(width=max(100, Console().width))
    console.print(table)
    for policy in policies:
        highest = policy["max_rate_at_99"]
        rate = "none of these" if highest is None else f"{highest:.3g} requests/s"
        console.print(f"{policy['policy']}: highest rate with an SLO attainment of 99 %: {rate}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _numbers(text: str, option: str) -> list[float]:
    return list(parse_numbers(text, option) or ())
