"""`muxjax bench serve`: policies in turn on the real engine, in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muxjax.cli.trace import recorded
from muxjax.errors import BenchError, WorkloadError

if TYPE_CHECKING:
    from muxjax.bench.compare import PolicyRun
    from muxjax.bench.isolated import IsolatedLatency
    from muxjax.bench.session import BenchSession
    from muxjax.placement.simulator.metrics import AttainmentCriterion
    from muxjax.placement.workload.trace import TraceRequest
    from muxjax.scheduling.timeline import Timeline


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(serve)


def serve(
    fleet_file: Annotated[Path, typer.Argument(metavar="FLEET", help="The fleet file (YAML).")],
    policy: Annotated[
        str | None,
        typer.Option(help="Policies, with commas between; by default the fleet file's."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each policy, in turn: A B A B.")] = 1,
    workload: Annotated[
        str,
        typer.Option(
            help="poisson, gamma, bursts, drift, or a trace: .jsonl (Mooncake), .csv (Azure, "
            "BurstGPT), .json (MuxServe)."
        ),
    ] = "poisson",
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds of the workload; 30 if it has no other end."),
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Most requests of the workload.")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Deal the total rate anew by this power law, most popular model first."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Total requests a second; by default the fleet's.")
    ] = None,
    cv: Annotated[
        float | None, typer.Option(help="gamma: variation of the gaps. [default: 4]")
    ] = None,
    on_off: Annotated[
        str | None,
        typer.Option(help="bursts: mean seconds with and without requests. [default: 10,30]"),
    ] = None,
    change_points: Annotated[
        str | None,
        typer.Option(help="drift: seconds at which the models swap rates. [default: each quarter]"),
    ] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option(help="Mean prompt of all models; by default the fleet's.")
    ] = None,
    output_tokens: Annotated[
        float | None, typer.Option(help="Mean output of all models; by default the fleet's.")
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(help="Spread of the lengths' logarithms; 0 makes all alike. [ShareGPT's]"),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option("--map", help="TRACE=MODEL: who serves a trace's model; may be repeated."),
    ] = None,
    slo_scale: Annotated[
        float | None,
        typer.Option(
            help="Latency allowed, in multiples of the request's alone, which is measured first. "
            "[default: 8, if no other target is given]"
        ),
    ] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Seconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Seconds for each token after it.")] = None,
    seed: Annotated[int, typer.Option(help="Of the workload and of the prompts.")] = 0,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write who ran when (Chrome trace, JSON): the latest 100,000 steps."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for JSON, records and plots.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replay a workload on the real engine, each policy in turn, on one pool.

    Models are loaded and compiled once. Ctrl-C keeps the runs that are complete, and the one under
    way as far as it came.
    """
    from muxjax.bench.workloads import WorkloadOptions
    from muxjax.config.fleet_file import load_fleet_config
    from muxjax.scheduling.specs import DEFAULT_SCALE

    config = load_fleet_config(fleet_file)
    policies = _policies(policy, config.policy)
    if rounds < 1:
        raise BenchError(f"--rounds must be at least 1, not {rounds}")
    for option, value in (
        ("--slo-scale", slo_scale),
        ("--slo-ttft", slo_ttft),
        ("--slo-tpot", slo_tpot),
    ):
        if value is not None and not value > 0:
            raise BenchError(f"{option} must be above 0, not {value}")
    phases = _numbers(on_off, "--on-off")
    if phases is not None and len(phases) != 2:
        raise WorkloadError(f"--on-off takes two numbers, not {on_off}")
    asked = WorkloadOptions(
        kind=workload,
        seconds=duration,
        requests=requests,
        alpha=alpha,
        rate=rate,
        cv=cv,
        on_off=None if phases is None else (phases[0], phases[1]),
        change_points=_numbers(change_points, "--change-points"),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        sigma=sigma,
        seed=seed,
    )
    if slo_scale is None and slo_ttft is None and slo_tpot is None:
        slo_scale = DEFAULT_SCALE

    from muxjax.bench.session import BenchSession
    from muxjax.bench.workloads import KINDS, fleet_rates, make_workload
    from muxjax.placement.simulator.metrics import AttainmentCriterion

    with BenchSession.load(config) as rig:
        limits = {name: model.max_model_len for name, model in rig.models.items()}
        source = make_workload(rig.config, limits, asked, _renamed(rename))
        # What a trace holds nobody knows before: its rates are those of the fleet file.
        rates = fleet_rates(rig.config, asked) if workload in KINDS else None
        targets = {
            name: AttainmentCriterion.from_targets(slo_ttft, slo_tpot, slo_scale, kind=name)
            for name in rig.models
        }
        with recorded(trace) as timeline:
            runs, solo = _run(rig, source, rates, policies, targets, rounds, seed, output, timeline)
    report = _report(fleet_file, policies, rounds, asked, targets, source, solo, runs)
    if output is not None:
        from muxjax.bench.report.saved import save

        save(report, output / "serve.json")
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from muxjax.bench.report.tables import show_serve

        show_serve(report)


def _run(
    rig: BenchSession,
    workload: Sequence[TraceRequest],
    rates: Mapping[str, float] | None,
    policies: Sequence[str],
    targets: Mapping[str, AttainmentCriterion],
    rounds: int,
    seed: int,
    output: Path | None,
    timeline: Timeline | None,
) -> tuple[list[PolicyRun], IsolatedLatency]:
    """Requests alone, then all runs, with a bar for each policy."""
    from muxjax.bench.compare import OnRecord, compare
    from muxjax.bench.isolated import measure_isolated
    from muxjax.progress import Bars

    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    with Bars({"requests alone": 1}, show=True) as bars:
        solo = measure_isolated(rig, workload)
        bars.advance("requests alone", 1, "")

    @contextmanager
    def records(policy: str, number: int) -> Iterator[OnRecord | None]:
        if output is None:
            yield None
            return
        from muxjax.bench.report.saved import record_file

        with record_file(output / f"requests-{policy}-r{number + 1}.csv") as take:
            yield take

    totals = {policy: rounds * len(workload) for policy in policies}
    with Bars(totals, show=True) as bars:
        runs = compare(
            rig,
            workload,
            policies,
            targets,
            solo,
            rates=rates,
            rounds=rounds,
            seed=seed,
            on_record=records,
            progress=lambda policy, number, more: bars.advance(policy, more, f"round {number + 1}"),
            timeline=timeline,
        )
    if runs and runs[-1].replay.interrupted:
        last = runs[-1]
        print(
            f"muxjax: interrupted in round {last.round + 1} of {last.policy}, with "
            f"{last.replay.interrupted} requests unfinished; medians are of complete runs",
            file=sys.stderr,
        )
    return runs, solo


def _report(
    fleet_file: Path,
    policies: Sequence[str],
    rounds: int,
    asked: Any,
    targets: Mapping[str, AttainmentCriterion],
    workload: Sequence[TraceRequest],
    solo: IsolatedLatency,
    runs: Sequence[PolicyRun],
) -> dict[str, Any]:
    from dataclasses import asdict

    from muxjax.bench.compare import medians
    from muxjax.bench.machine import machine

    return {
        "kind": "serve",
        **machine(),
        "fleet": str(fleet_file),
        "policies": list(policies),
        "rounds": rounds,
        "workload": {**asdict(asked), "offered": len(workload)},
        "targets": {name: target.to_json() for name, target in targets.items()},
        "solo": solo.rows,
        "medians": medians(runs, policies),
        "runs": [{"policy": run.policy, "round": run.round + 1, **run.metrics} for run in runs],
    }


def _policies(text: str | None, default: str) -> list[str]:
    """The policies that are asked for."""
    from muxjax.scheduling.policies.registry import policy_names

    names = [default] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in policy_names():
            raise BenchError(f"no policy {name!r}; there are {', '.join(policy_names())}")
    if len(set(names)) < len(names):
        raise BenchError(f"--policy must name policies, each once, not {text!r}")
    return names


def _renamed(pairs: Sequence[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs or ():
        source, _, target = pair.partition("=")
        if not (source and target):
            raise WorkloadError(f"--map is written TRACE=MODEL, not {pair!r}")
        found[source] = target
    return found


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise WorkloadError(f"{option} takes numbers with commas between, not {text!r}") from error
