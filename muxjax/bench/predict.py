"""What the simulator says a rig will do: the rig's own scheduler on a simulated clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from muxjax.bench.profile_file import profile_of
from muxjax.bench.session import BenchSession
from muxjax.bench.steps import StepMeasurement
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_executor import SimulatedExecutor, SimulatedModel
from muxjax.placement.simulator.simulator import Simulation, UnitSimulation
from muxjax.placement.workload.trace import TraceRequest
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.specs import LatencySlo


def rig_profile(rig: BenchSession, measured: StepMeasurement) -> ProfileTable:
    """The profile of a rig whose steps were just measured."""
    times = {name: measured.times(name) for name in rig.models}
    limits = {name: rig.specs[name].limits for name in rig.models}
    longest = {name: model.max_model_len for name, model in rig.models.items()}
    return ProfileTable(profile_of(times, limits, longest), rig.shapes)


def simulate_rig(
    rig: BenchSession,
    profile: ProfileTable,
    workload: Sequence[TraceRequest],
    policy: str,
    estimates: StepEstimates | None = None,
    *,
    slower: float = 1.0,
    targets: Mapping[str, LatencySlo] | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[RequestRecord]:
    """Simulates a run of the rig.

    Args:
      rig: whose scheduler, quotas and pool; its executor is not used.
      profile: with the steps of all of its models, under their names.
      workload: in order of arrival.
      policy: the scheduler's.
      estimates: step times that it begins with, as in the real run.
      slower: how long steps take, as a multiple of the profile's (`in_service.speed_now`).
      targets: of each model, see `BenchSession.unit`.
      rates: that the scheduler expects, see `BenchSession.unit`.

    Returns:
      A record for each request, in the workload's order.
    """
    models: Mapping[str, SimulatedModel] = {
        name: SimulatedModel(
            name,
            max_seqs=rig.buckets[name].max_seqs,
            times=profile.step_times[name].scaled(slower),
        )
        for name in rig.models
    }
    executor = SimulatedExecutor(models, profile, "time_sliced")
    # A simulated prompt's tokens mean nothing: all would be found in the prefix cache.
    scheduler = rig.unit(policy, estimates, targets, rates, prefix_cache=False)
    unit = UnitSimulation("simulated", scheduler, executor)
    records: list[RequestRecord] = []
    Simulation([unit]).run(workload, records.append)
    return sorted(records, key=lambda record: record.id)
