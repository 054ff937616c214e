"""Simulates a bench session: the real scheduler, measured step times and a simulated clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from muxjax.bench.profile_file import build_profile
from muxjax.bench.session import BenchSession
from muxjax.bench.steps import StepMeasurement
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_executor import SimulatedExecutor, SimulatedModel
from muxjax.placement.simulator.simulator import Simulation, UnitSimulation
from muxjax.placement.workload.trace import TraceRequest
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.specs import LatencySlo


def session_profile(session: BenchSession, measured: StepMeasurement) -> ProfileTable:
    """The profile table of a session's measured steps."""
    times = {name: measured.times(name) for name in session.models}
    limits = {name: session.specs[name].limits for name in session.models}
    longest = {name: model.max_model_len for name, model in session.models.items()}
    return ProfileTable(build_profile(times, limits, longest), session.shapes)


def simulate_session(
    session: BenchSession,
    profile: ProfileTable,
    workload: Sequence[TraceRequest],
    policy: str,
    estimates: StepEstimates | None = None,
    *,
    slowdown: float = 1.0,
    targets: Mapping[str, LatencySlo] | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[RequestRecord]:
    """Simulates a run of the session.

    Args:
      session: provides the scheduler, quotas and pool size; its executor is not used.
      profile: step times of all models, by name.
      workload: requests in order of arrival.
      policy: the scheduling policy.
      estimates: initial step times of the scheduler, as in the real run.
      slowdown: factor on the profile's step times (see `step_recorder.speed_now`).
      targets: latency targets by model; see `BenchSession.new_scheduler`.
      rates: expected rates by model; see `BenchSession.new_scheduler`.

    Returns:
      A record for each request, in workload order.
    """
    models: Mapping[str, SimulatedModel] = {
        name: SimulatedModel(
            name,
            max_seqs=session.buckets[name].max_seqs,
            times=profile.step_times[name].scaled(slowdown),
        )
        for name in session.models
    }
    executor = SimulatedExecutor(models, profile, "time_sliced")
    # Simulated prompts are identical, so the prefix cache would find all of them.
    scheduler = session.new_scheduler(policy, estimates, targets, rates, prefix_cache=False)
    unit = UnitSimulation("simulated", scheduler, executor)
    records: list[RequestRecord] = []
    Simulation([unit]).run(workload, records.append)
    return sorted(records, key=lambda record: record.id)
