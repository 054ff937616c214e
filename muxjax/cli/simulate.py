"""`muxjax simulate`: what a plan delivers, under several policies and rates."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from muxjax.cli.trace import recorded
from muxjax.errors import PlanError, WorkloadError

if TYPE_CHECKING:
    from muxjax.placement.planner.plan import Execution, PlacementPlan
    from muxjax.placement.simulator.simulated_units import SystemConfig
    from muxjax.placement.simulator.simulation import SimulationSetup
    from muxjax.placement.workload.trace import Workload
    from muxjax.placement.workload.trace_files import TraceFile
    from muxjax.scheduling.specs import LatencySlo
    from muxjax.scheduling.timeline import Timeline

KINDS = ("poisson", "gamma", "bursts", "drift")
"""SyntheticWorkload workloads; anything else that `--workload` names is a trace's file."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(simulate)


def simulate(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="PLAN|FLEET", help="A plan (JSON), or a fleet to plan first."),
    ] = None,
    muxserve: Annotated[
        Path | None, typer.Option(help="MuxServe's models.yaml, to plan first.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="What to plan on, as 4x8:a100-80gb; by default what the file says."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Measured step times to plan with (JSON).")
    ] = None,
    workload: Annotated[
        str,
        typer.Option(
            help="poisson, gamma, bursts, drift, or a trace: .jsonl (Mooncake), .csv (Azure, "
            "BurstGPT), .json (MuxServe)."
        ),
    ] = "poisson",
    seconds: Annotated[
        float | None, typer.Option(help="Length of the workload; 120 if it has no other end.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Most requests of the workload.")] = None,
    cv: Annotated[
        float | None,
        typer.Option(help="gamma: variation of the gaps. [default: 4]"),
    ] = None,
    on_off: Annotated[
        str | None,
        typer.Option(help="bursts: mean seconds with and without requests. [default: 10,30]"),
    ] = None,
    change_points: Annotated[
        str | None,
        typer.Option(help="drift: seconds at which the models swap rates. [default: each quarter]"),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Deal the total rate anew by this power law, most popular model first."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Total requests a second; by default the plan's.")
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option(help="ShareGPT's JSON to draw lengths from, for all models.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json that counts its tokens; else four bytes are a token."),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option("--map", help="TRACE=MODEL: who serves a trace's model; may be repeated."),
    ] = None,
    rate_scales: Annotated[
        str, typer.Option(help="The workload is run at each of these multiples of its rate.")
    ] = "0.5,1,1.5,2",
    policy: Annotated[
        str,
        typer.Option(
            help="Policies to compare, separated by commas: those of the fleet file, and spatial "
            "(each model on its own devices)."
        ),
    ] = "adbs",
    execution: Annotated[
        str | None,
        typer.Option(help="time_sliced or concurrent; by default what the plan was made for."),
    ] = None,
    slo_scale: Annotated[
        float | None,
        typer.Option(
            help="Latency allowed, in multiples of the request's alone. [default: 8, if no other "
            "target is given]"
        ),
    ] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Seconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Seconds for each token after it.")] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(help="Requests of a model that may wait; more are rejected. Any by default."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the workload, and of the plan if one is made.")] = 0,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write who ran when (Chrome trace, JSON): the latest 100,000 steps."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for JSON, tables, records and plots.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Simulate a plan: the real scheduler on a simulated clock."""
    from muxjax.placement.simulator.metrics import AttainmentCriterion
    from muxjax.placement.simulator.plan_costs import plan_costs, plan_criteria
    from muxjax.placement.simulator.simulation import SimulationSetup, validate_scales
    from muxjax.placement.workload.trace import TruncatedWorkload
    from muxjax.placement.workload.trace_files import open_trace
    from muxjax.scheduling.specs import DEFAULT_SCALE

    scales = validate_scales(_numbers(rate_scales, "--rate-scales"))
    if execution is not None:
        _systems(policy, execution)  # a mistake in them is told before a long search
    plan, slos = _plan(file, muxserve, cluster, profile, execution, seed)
    systems = _systems(policy, execution or plan.execution)
    costs = plan_costs(plan)
    if slo_scale is not None or slo_ttft is not None or slo_tpot is not None:
        slos = {}
    else:
        slo_scale = DEFAULT_SCALE
    asked = AttainmentCriterion.from_targets(slo_ttft, slo_tpot, slo_scale)
    targets = plan_criteria(plan, costs, asked, slos)
    if max_waiting is not None and max_waiting < 1:
        raise WorkloadError(f"--max-waiting must be at least 1, not {max_waiting}")
    if requests is not None and requests < 1:
        raise WorkloadError(f"--requests must be at least 1, not {requests}")
    if seconds is not None and not seconds > 0:
        raise WorkloadError(f"--seconds must be above 0, not {seconds}")
    described: dict[str, Any] = {
        "workload": workload,
        "seconds": seconds,
        "requests": requests,
        "cv": cv,
        "on_off": on_off,
        "change_points": change_points,
        "alpha": alpha,
        "rate": rate,
        "lengths": None if lengths is None else str(lengths),
        "map": rename,
    }
    source: Workload
    file_of: TraceFile | None = None
    if workload in KINDS:
        if rename:
            raise WorkloadError("--map is for traces; a synthetic workload names the plan's models")
        source = _synthetic(
            plan,
            workload,
            seconds=seconds,
            requests=requests,
            cv=cv,
            on_off=on_off,
            change_points=change_points,
            alpha=alpha,
            rate=rate,
            lengths=lengths,
            tokenizer=tokenizer,
            seed=seed,
        )
    else:
        for option, value in (
            ("--cv", cv),
            ("--on-off", on_off),
            ("--change-points", change_points),
            ("--alpha", alpha),
            ("--rate", rate),
            ("--lengths", lengths),
            ("--tokenizer", tokenizer),
        ):
            if value is not None:
                raise WorkloadError(f"{option} is for synthetic workloads; {workload} is a trace")
        if not Path(workload).is_file():
            raise WorkloadError(
                f"no workload {workload!r}: neither one of {', '.join(KINDS)} nor a trace's file"
            )
        file_of = open_trace(Path(workload))
        source = TruncatedWorkload(_assigned(plan, file_of, rename or [], seed), requests, seconds)
    last: float | None = None
    for request in source:  # a trace that is out of order says so before anything is run
        last = request.arrival
    if last is None:
        raise WorkloadError("the workload has no requests: make it longer, or raise its rate")
    if file_of is not None and file_of.left_out:
        described["left_out"] = file_of.left_out
        print(f"muxjax: {file_of.left_out} failed requests of {workload} left out", file=sys.stderr)
    setup = SimulationSetup(plan, costs, targets, max_waiting, seed, described)
    fixed = file_of is None and requests is None  # as long at any rate
    with recorded(trace) as timeline:
        found = _run_all(setup, systems, source, last, fixed, scales, output, timeline)
    report = {
        "seed": seed,
        "config_hash": found[0]["config_hash"],
        "version": found[0]["version"],
        "workload": described,
        "targets": {name: target.to_json() for name, target in targets.items()},
        "policies": found,
    }
    if output is not None:
        _write(report, output)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    _show(found)


def _plan(
    file: Path | None,
    muxserve: Path | None,
    cluster: str | None,
    profile: Path | None,
    execution: str | None,
    seed: int,
) -> tuple[PlacementPlan, dict[str, LatencySlo]]:
    """The plan, read or made, and the latency targets that the fleet file has."""
    from muxjax.placement.planner.plan import load_plan
    from muxjax.placement.planner.planner import PlannerOptions

    if file is not None and file.suffix.lower() == ".json":
        for option, value in (
            ("--muxserve", muxserve),
            ("--cluster", cluster),
            ("--profile", profile),
        ):
            if value is not None:
                raise PlanError(f"{option} is for making a plan; {file} is one already")
        return load_plan(file), {}

    from muxjax.cli.plan import read_fleet, search_plan
    from muxjax.units.plan_inputs import plan_inputs

    inputs = plan_inputs(read_fleet(file, muxserve), cluster=cluster, profile=profile)
    chosen: Execution = inputs.execution if execution is None else execution  # type: ignore[assignment]  # checked
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
    plan: PlacementPlan,
    kind: str,
    *,
    seconds: float | None,
    requests: int | None,
    cv: float | None,
    on_off: str | None,
    change_points: str | None,
    alpha: float | None,
    rate: float | None,
    lengths: Path | None,
    tokenizer: Path | None,
    seed: int,
) -> Workload:
    from muxjax.placement.simulator.planned_workload import planned_traffic
    from muxjax.placement.workload.synthetic import ArrivalProcess, SyntheticWorkload

    for option, value, owner in (
        ("--cv", cv, "gamma"),
        ("--on-off", on_off, "bursts"),
        ("--change-points", change_points, "drift"),
    ):
        if value is not None and kind != owner:
            raise WorkloadError(f"{option} is for --workload {owner}, not {kind}")
    if tokenizer is not None and lengths is None:
        raise WorkloadError("--tokenizer counts the tokens of --lengths, which is missing")
    if seconds is None and requests is None:
        seconds = 120.0
    arrivals = ArrivalProcess()
    if kind == "gamma":
        arrivals = ArrivalProcess(cv=4.0 if cv is None else cv)
    elif kind == "bursts":
        phases = _numbers(on_off or "10,30", "--on-off")
        if len(phases) != 2:
            raise WorkloadError(f"--on-off takes two numbers, not {on_off}")
        arrivals = ArrivalProcess(on_off=(phases[0], phases[1]))
    elif kind == "drift":
        if change_points is None and seconds is None:
            raise WorkloadError("--workload drift needs --change-points or --seconds")
        points = (
            _numbers(change_points, "--change-points")
            if change_points is not None
            else [part / 4 * (seconds or 0.0) for part in (1, 2, 3)]
        )
        arrivals = ArrivalProcess(change_points=tuple(points))
    traffic = planned_traffic(plan, alpha=alpha, rate=rate, pairs=_pairs(lengths, tokenizer))
    return SyntheticWorkload(traffic, seconds, requests, arrivals, seed)


def _pairs(lengths: Path | None, tokenizer: Path | None) -> Sequence[tuple[int, int]] | None:
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

    renamed: dict[str, str] = {}
    for pair in rename:
        source, _, target = pair.partition("=")
        if not (source and target):
            raise WorkloadError(f"--map is written TRACE=MODEL, not {pair!r}")
        renamed[source] = target
    return AssignedWorkload(trace, planned_rates(plan), renamed, seed)


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
    """All runs, with a bar for each policy, and each run's records in a file of their own.

    Args:
      setup: what stays the same.
      systems: policies to compare.
      workload: at scale 1.
      last: its last arrival, for the bars.
      fixed: whether it lasts as long at any rate.
      scales: of the rate.
      output: the folder for the records.
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

        def one(system: SystemConfig, scale: float, scaled: Workload) -> dict[str, Any]:
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

        return sweep_rates(setup, systems, workload, scales, run=one)


def _write(report: Mapping[str, Any], output: Path) -> None:
    from muxjax.placement.simulator.output_files import write_json, write_plots, write_tables

    write_json(report, output / "simulation.json")
    write_tables(report["policies"], output)
    try:
        write_plots(report["policies"], output)
    except ImportError:
        print("muxjax: no plots: pip install 'muxjax[plot]' for them", file=sys.stderr)


def _show(policies: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="simulated", caption="rates and throughputs in requests/s, times in s")
    columns = ("policy", "rate", "served", "weighted", "goodput", "in target")
    for column in (*columns, "TTFT p99", "TPOT p99", "refused"):
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
        found = "none of these" if highest is None else f"{highest:.3g} requests/s"
        console.print(f"{policy['policy']}: highest rate with 99 % within target: {found}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise WorkloadError(f"{option} takes numbers with commas between, not {text!r}") from error
