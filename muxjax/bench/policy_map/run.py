"""Runs a grid of policy-map cells in parallel and keeps the results in a file.

The map compares `slo` with every baseline policy over popularity, load and SLO scale, in
simulation: MuxServe's mix of 19 models on 32 devices, rates by a power law with exponent `alpha`,
the most popular model at `load` times 40 requests per second, log-normal lengths with ShareGPT's
means.

Each policy uses the best of several placements: planned for throughput, planned for latency
targets, MuxServe's (concurrent execution only), and the spatial one, with separate devices for
every model. The policy `spatial` may use only the spatial placement. The choice for `slo` is
described in `PlacementChooser`. All policies are scored on the same requests.

Attainment is the fraction of requests whose latency is at most `slo_scale` times their isolated
latency, which is computed for the fewest devices that the model's weights fit on.

The criteria: in every cell, the attainment of `slo` is at most one point below the best baseline,
and its throughput is at least 99 % of that of `adbs`, both in total and weighted by rate. The mean
attainment of `slo` over the map is the highest.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from muxjax.bench.policy_map.cells import POLICIES, simulate_cells
from muxjax.bench.policy_map.scenario import CellJob, Hardware
from muxjax.bench.policy_map.summary import cell_key, report
from muxjax.errors import BenchError
from muxjax.placement.planner.plan import Execution
from muxjax.placement.simulator.simulated_units import PolicyName
from muxjax.progress import Bars


@dataclass(frozen=True)
class MapGrid:
    """The cells of a map; see `CellJob` for the fields.

    Raises:
      BenchError: a value out of range, or `slo` or `adbs` is missing.
    """

    profile: Path
    executions: tuple[Execution, ...] = ("time_sliced", "concurrent")
    hardware: tuple[Hardware, ...] = ("a100",)
    alphas: tuple[float, ...] = (0.7, 0.9, 1.3, 1.7, 2.1)
    loads: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25)
    scales: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0)
    policies: tuple[PolicyName, ...] = POLICIES
    seconds: float = 10.0
    seed: int = 0
    ahead: bool = False

    def __post_init__(self) -> None:
        if not {"slo", "adbs"} <= set(self.policies):
            raise BenchError("--policies must include slo and adbs, which the criteria compare")
        for option, values in (
            ("--alpha", self.alphas),
            ("--load", self.loads),
            ("--slo-scale", self.scales),
            ("--seconds", (self.seconds,)),
        ):
            if any(not 0 < value < float("inf") for value in values):
                raise BenchError(f"{option} must be above 0, not {values}")

    def jobs(self) -> list[CellJob]:
        """One job for each execution model, hardware, alpha and load."""
        return [
            CellJob(
                alpha,
                load,
                tuple(sorted(set(self.scales))),
                execution,
                hardware,
                self.seconds,
                self.seed,
                self.policies,
                self.profile,
                self.ahead,
            )
            for hardware, execution, alpha, load in itertools.product(
                self.hardware, self.executions, self.alphas, self.loads
            )
        ]


def select_cells(cells: Sequence[dict[str, Any]], jobs: Sequence[CellJob]) -> list[dict[str, Any]]:
    """The cells that belong to the jobs."""
    wanted = {job_cell_key(job, scale) for job in jobs for scale in job.scales}
    return [cell for cell in cells if cell_key(cell) in wanted]


def read_map(path: Path | None) -> list[dict[str, Any]]:
    """The cells in a file of earlier runs; none without a file."""
    if path is None or not path.exists():
        return []
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run_jobs(
    jobs: Sequence[CellJob], processes: int, known: list[dict[str, Any]], output: Path | None
) -> None:
    """Runs jobs in parallel, adds their cells to `known`, and writes the file after each job.

    For a cell in `known`, only the missing policies are simulated.

    Args:
      jobs: the jobs of the grid.
      processes: number of worker processes.
      known: cells of earlier runs; extended in place.
      output: the file to write; None writes nothing.
    """
    by_key = {cell_key(cell): cell for cell in known}
    remaining = [job for job in (_missing_part(job, by_key) for job in jobs) if job is not None]
    with Bars({"simulating": len(remaining)}, show=True) as bars, WorkerPool(processes) as pool:
        running: dict[Future[list[dict[str, Any]]], CellJob] = {}
        waiting = list(remaining)
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                running[pool.submit(simulate_cells, job)] = job
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                job = running.pop(future)
                for cell in future.result():
                    _merge(cell, by_key, known)
                if output is not None:
                    write_map(known, output)
                bars.advance("simulating", 1, f"{job.execution} {job.hardware} {job.alpha:g}")


def _missing_part(
    job: CellJob, by_key: Mapping[tuple[Any, ...], Mapping[str, Any]]
) -> CellJob | None:
    """The scales and policies of a job that are not known; None if all are."""
    policies: set[str] = set()
    scales = []
    for scale in job.scales:
        cell = by_key.get(job_cell_key(job, scale))
        missing = set(job.policies).difference(cell["slo_attainment"] if cell else ())
        if missing:
            # The placement of `slo` depends on the attainment of the other policies.
            policies |= set(job.policies) if "slo" in missing else missing
            scales.append(scale)
    ordered = tuple(policy for policy in job.policies if policy in policies)
    return replace(job, scales=tuple(scales), policies=ordered) if scales else None


def _merge(
    cell: dict[str, Any], by_key: dict[tuple[Any, ...], dict[str, Any]], known: list[Any]
) -> None:
    previous = by_key.get(cell_key(cell))
    if previous is None:
        by_key[cell_key(cell)] = cell
        known.append(cell)
        return
    for key in ("slo_attainment", "throughput", "placement"):
        previous[key].update(cell[key])


def write_map(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the file of a map atomically."""
    text = json.dumps(report(cells), indent=1)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


class WorkerPool(ProcessPoolExecutor):
    """A process pool that does not wait for its processes after an error or Ctrl-C."""

    def __exit__(self, kind: object, *rest: object) -> None:
        self.shutdown(wait=kind is None, cancel_futures=True)


def job_cell_key(job: CellJob, scale: float) -> tuple[Any, ...]:
    """The identity of a job's cell, as `summary.cell_key` computes it."""
    key = (job.execution, job.hardware, job.alpha, job.load, scale, job.seed, job.seconds)
    return (*key, job.ahead)
