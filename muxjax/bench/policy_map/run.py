"""The policy map: `slo` against every baseline, over popularity, load and SLO scale. Simulated.

    python benchmarks/policy_map.py [--execution time_sliced,concurrent] [--hardware a100,h200,v6e]
        [--alpha 0.7,2.1] [--load 1] [--slo-scale 2,4,8,16] [--seed 0] [--seconds 10] [--ahead]
        [--processes 2] [--json] [--output map.json] [--plot map.svg]

MuxServe's mix of 19 models on 32 devices, rates by a power law with exponent `alpha`, the most
popular at `load` x 40 requests/s, lengths as ShareGPT's means. Without options the whole grid is
run, 80 cells for each map. Each policy takes its own best placement of those planned for
throughput, for targets, by MuxServe's own search (where programs run side by side), and each model
on its own devices, which is all that `spatial` may take; where a model is alone on a mesh, as one
or as several copies. Which is best is tried on requests of another seed; all policies are then
scored on the same requests. `slo` takes the one that `adbs` takes, unless it attains a point more
on another and serves as much there. Attainment is the part of all requests whose latency is at most
`slo_scale` times what they take alone on the fewest devices that hold the model.

The bars: `slo` attains at most a point less than the best of all baselines in every cell, more on
average, and its throughput, total and weighted by rate, is at most 1 % under that of `adbs`.

What is in `--output` already is kept, policy by policy, so that a run that was stopped goes on;
Ctrl-C writes what is finished. The A100's step times are MuxServe's profile (`--profile`, or
`muxserve_a100_profile.json` in `MUXJAX_SHARED_DATA`); the others are a roofline's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))
from muxjax.bench.policy_map.cells import POLICIES, cells
from muxjax.bench.policy_map.scenario import CellJob, Hardware, default_profile
from muxjax.bench.policy_map.picture import draw
from muxjax.bench.policy_map.summary import place_of, report, show

from muxjax.placement.planner.plan import Execution
from muxjax.progress import Bars

ALPHAS = (0.7, 0.9, 1.3, 1.7, 2.1)
LOADS = (0.5, 0.75, 1.0, 1.25)
SCALES = (2.0, 4.0, 8.0, 16.0)


def run(
    jobs: Sequence[CellJob], processes: int, known: list[dict[str, Any]], output: Path | None
) -> None:
    """Adds the cells of the jobs to those that are known, and writes them as they come.

    Of a cell that is known only the policies are simulated that it lacks.
    """
    by_place = {place_of(cell): cell for cell in known}
    left = [job for job in (_lacking(job, by_place) for job in jobs) if job is not None]
    with Bars({"simulating": len(left)}, show=True) as bars, _Pool(processes) as pool:
        running: dict[Future[list[dict[str, Any]]], CellJob] = {}
        waiting = list(left)
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                running[pool.submit(cells, job)] = job
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                job = running.pop(future)
                for cell in future.result():
                    _add(cell, by_place, known)
                if output is not None:
                    write(known, output)
                bars.advance("simulating", 1, f"{job.execution} {job.hardware} {job.alpha:g}")


def _lacking(job: CellJob, by_place: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> CellJob | None:
    """What of a job is not known."""
    policies: set[str] = set()
    scales = []
    for scale in job.scales:
        cell = by_place.get(_cell_of(job, scale))
        lacking = set(job.policies).difference(cell["slo_attainment"] if cell else ())
        if lacking:
            # Where `slo` is placed depends on what the others attain.
            policies |= set(job.policies) if "slo" in lacking else lacking
            scales.append(scale)
    ordered = tuple(policy for policy in job.policies if policy in policies)
    return replace(job, scales=tuple(scales), policies=ordered) if scales else None


def _add(
    cell: dict[str, Any], by_place: dict[tuple[Any, ...], dict[str, Any]], known: list[Any]
) -> None:
    old = by_place.get(place_of(cell))
    if old is None:
        by_place[place_of(cell)] = cell
        known.append(cell)
        return
    for key in ("slo_attainment", "throughput", "placement"):
        old[key].update(cell[key])


def write(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the map's file, whole or not at all."""
    text = json.dumps(report(found), indent=1)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


class _Pool(ProcessPoolExecutor):
    """Processes that are not waited for when the run is stopped."""

    def __exit__(self, kind: object, *rest: object) -> None:
        self.shutdown(wait=kind is None, cancel_futures=True)


def _cell_of(job: CellJob, scale: float) -> tuple[Any, ...]:
    place = (job.execution, job.hardware, job.alpha, job.load, scale, job.seed, job.seconds)
    return (*place, job.ahead)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers separated by commas, not {text!r}") from None
    if any(not 0 < number < float("inf") for number in found):
        raise argparse.ArgumentTypeError(f"each must be above 0, not {text}")
    return found


def _choice(known: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def main() -> None:
    """Runs the map."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--execution", type=_choice(get_args(Execution)), default=("time_sliced", "concurrent")
    )
    parser.add_argument("--hardware", type=_choice(get_args(Hardware)), default=("a100",))
    parser.add_argument("--alpha", type=_numbers, default=ALPHAS)
    parser.add_argument("--load", type=_numbers, default=LOADS)
    parser.add_argument("--slo-scale", type=_numbers, default=SCALES)
    parser.add_argument("--policies", type=_choice(POLICIES), default=POLICIES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="of arrivals")
    parser.add_argument("--ahead", action="store_true", help="choose placements on other requests")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--profile", type=Path, default=None)
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument("--output", type=Path, help="keep cells here, and go on from there")
    parser.add_argument("--plot", type=Path, help="draw the maps (SVG)")
    arguments = parser.parse_args()
    if not {"slo", "adbs"} <= set(arguments.policies):
        parser.error("--policies must have slo and adbs, which the bars are about")
    if arguments.processes < 1 or not arguments.seconds > 0:
        parser.error("--processes and --seconds must be above 0")
    profile = arguments.profile or default_profile()
    jobs = [
        CellJob(
            alpha,
            load,
            tuple(sorted(set(arguments.slo_scale))),
            execution,
            hardware,
            arguments.seconds,
            arguments.seed,
            arguments.policies,
            profile,
            arguments.ahead,
        )
        for hardware, execution, alpha, load in itertools.product(
            arguments.hardware, arguments.execution, arguments.alpha, arguments.load
        )
    ]
    found: list[dict[str, Any]] = []
    if arguments.output is not None and arguments.output.exists():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))["cells"]
    stopped = False
    try:
        run(jobs, arguments.processes, found, arguments.output)
    except KeyboardInterrupt:
        stopped = True
        print("stopped; what is finished is kept", file=sys.stderr)
    wanted = {_cell_of(job, scale) for job in jobs for scale in job.scales}
    here = [cell for cell in found if place_of(cell) in wanted]
    if here:
        show(here)
        if arguments.plot is not None:
            draw(here, arguments.plot)
    if arguments.json:
        print(json.dumps(report(here), indent=1))
    if stopped:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
