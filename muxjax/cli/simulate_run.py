"""The plan, workload and runs of `muxjax simulate`. Imports no JAX."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

from muxjax.cli.options import ArrivalOptions, parse_model_map, parse_numbers
from muxjax.cli.plan_run import read_fleet, search_plan
from muxjax.cli.simulate_options import KINDS, PlanOptions, SimulateLengthOptions
from muxjax.errors import PlanError, WorkloadError
from muxjax.placement.planner.plan import Execution, PlacementPlan, load_plan
from muxjax.placement.planner.planner import PlannerOptions
from muxjax.placement.simulator.fleet_plan import SECONDS, promise_seconds
from muxjax.placement.simulator.output_files import (
    record_file,
    write_json,
    write_plots,
    write_tables,
)
from muxjax.placement.simulator.planned_workload import planned_rates, planned_traffic
from muxjax.placement.simulator.simulated_units import SystemConfig, simulated_policy_names
from muxjax.placement.simulator.simulation import SimulationSetup, run_simulation, sweep_rates
from muxjax.placement.workload.sharegpt import approximate_tokens, sharegpt_lengths
from muxjax.placement.workload.synthetic import ArrivalProcess, AssignedWorkload, SyntheticWorkload
from muxjax.placement.workload.trace import TruncatedWorkload, Workload
from muxjax.placement.workload.trace_files import TraceFile, open_trace
from muxjax.progress import Bars
from muxjax.scheduling.timeline import Timeline
from muxjax.units.plan_inputs import plan_inputs


def check_limits(
    workload: ArrivalOptions, lengths: SimulateLengthOptions, max_waiting: int | None
) -> None:
    """Checks the limits of the workload.

    Raises:
      WorkloadError: a limit is not above 0.
    """
    if max_waiting is not None and max_waiting < 1:
        raise WorkloadError(f"--max-waiting must be at least 1, not {max_waiting}")
    if workload.requests is not None and workload.requests < 1:
        raise WorkloadError(f"--requests must be at least 1, not {workload.requests}")
    if lengths.seconds is not None and not lengths.seconds > 0:
        raise WorkloadError(f"--seconds must be above 0, not {lengths.seconds}")


def build_workload(
    plan: PlacementPlan,
    workload: ArrivalOptions,
    lengths: SimulateLengthOptions,
    rename: Sequence[str] | None,
    seed: int,
) -> tuple[Workload, TraceFile | None]:
    """Returns the workload, and the trace file that it is read from, if any.

    Raises:
      WorkloadError: an option that does not apply, or a file that is not a trace.
    """
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


def load_or_search_plan(file: Path | None, options: PlanOptions, seed: int) -> PlacementPlan:
    """Loads a plan, or plans a fleet.

    Raises:
      PlanError: the plan is not valid, or no placement fits.
    """
    if file is not None and file.suffix.lower() == ".json":
        for option, value in (
            ("--muxserve", options.muxserve),
            ("--cluster", options.cluster),
            ("--profile", options.profile),
        ):
            if value is not None:
                raise PlanError(f"{option} is for planning a fleet; {file} is already a plan")
        return load_plan(file)

    fleet = read_fleet(file, options.muxserve)
    inputs = plan_inputs(fleet, cluster=options.cluster, profile=options.profile)
    execution: Execution = inputs.execution if options.execution is None else options.execution  # type: ignore[assignment]  # checked
    return search_plan(inputs, PlannerOptions(execution, "slo", seed=seed), fleet.policy)


def parse_systems(policies: str, execution: str) -> list[SystemConfig]:
    """Returns the systems to simulate, one for each policy.

    Raises:
      PlanError: an unknown policy or execution, or a policy named twice.
    """
    if execution not in get_args(Execution):
        raise PlanError(f"no execution {execution!r}; there are {', '.join(get_args(Execution))}")
    known = simulated_policy_names()
    names = [name.strip() for name in policies.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise PlanError(f"no policy {name!r}; there are {', '.join(known)}")
    if not names or len(set(names)) < len(names):
        raise PlanError(f"--policy must list policies, each once, not {policies!r}")
    return [SystemConfig(name, execution) for name in names]  # type: ignore[arg-type]  # checked


def _synthetic(
    plan: PlacementPlan, workload: ArrivalOptions, lengths: SimulateLengthOptions, seed: int
) -> Workload:
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
        seconds = promise_seconds(plan.rate) if plan.rate else SECONDS
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
    """Returns the arrival process of a synthetic workload."""
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
    return AssignedWorkload(trace, planned_rates(plan), parse_model_map(rename), seed)


def run_policies(
    setup: SimulationSetup,
    systems: Sequence[SystemConfig],
    workload: Workload,
    last_arrival: float,
    fixed_length: bool,
    scales: Sequence[float],
    output: Path | None,
    timeline: Timeline | None,
) -> list[dict[str, Any]]:
    """Runs all policies at all rates, with a progress bar for each policy.

    Args:
      setup: settings of all runs.
      systems: policies to compare.
      workload: the workload at scale 1.
      last_arrival: its last arrival in seconds, for the progress bars.
      fixed_length: whether its length in seconds is the same at any rate.
      scales: multiples of the rate.
      output: folder for the records of each run; None writes none.
      timeline: records the steps of all runs.
    """
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    steps = 1000
    totals: dict[str, int] = {system.policy: steps * len(scales) for system in systems}
    with Bars(totals, show=True) as bars:

        def run_policy(system: SystemConfig, scale: float, scaled: Workload) -> dict[str, Any]:
            shown = 0
            end = last_arrival if fixed_length else last_arrival / scale

            def progress(arrival: float) -> None:
                nonlocal shown
                position = int(steps * min(1.0, arrival / end)) if end else steps
                bars.advance(system.policy, position - shown, f"rate x {scale:.3g}")
                shown = position

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

        return sweep_rates(setup, systems, workload, scales, run=run_policy)


def write_report(report: Mapping[str, Any], output: Path) -> None:
    """Writes the report to a folder as JSON and tables, and as plots if matplotlib is installed."""
    write_json(report, output / "simulation.json")
    write_tables(report["policies"], output)
    try:
        write_plots(report["policies"], output)
    except ImportError:
        print("muxjax: no plots; they need matplotlib: pip install 'muxjax[plot]'", file=sys.stderr)


def parse_scales(text: str, option: str) -> list[float]:
    """Parses the comma-separated numbers of an option."""
    return list(parse_numbers(text, option) or ())
