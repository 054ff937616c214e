from __future__ import annotations

import pytest

from muxjax.errors import WorkloadError
from muxjax.placement.planner.plan import Execution, PlannedUnit
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_units import (
    PolicyName,
    StepSizes,
    SystemConfig,
    build_simulated_unit,
)
from muxjax.placement.simulator.simulator import Simulation, UnitSimulation
from muxjax.placement.workload.synthetic import SyntheticWorkload, Traffic
from muxjax.placement.workload.trace import TraceRequest
from tests.placement.simple_costs import SHAPE, SimpleCosts, planned, unit

SHAPES = {"small": SHAPE, "large": SHAPE}


def made(
    *units: PlannedUnit,
    policy: PolicyName = "adbs",
    execution: Execution = "time_sliced",
    decode_tokens: int = 1,
) -> list[UnitSimulation]:
    system = SystemConfig(policy, execution, StepSizes(decode_tokens=decode_tokens))
    return [
        build_simulated_unit(one, system, SimpleCosts(), SHAPES, bandwidth=None) for one in units
    ]


def run(
    units: list[UnitSimulation], *requests: TraceRequest, max_waiting: int | None = None
) -> dict[int, RequestRecord]:
    records: list[RequestRecord] = []
    Simulation(units, max_waiting=max_waiting).run(requests, records.append)
    assert len({record.id for record in records}) == len(requests)
    return {record.id: record for record in records}


def test_one_request_takes_what_the_cost_model_says() -> None:
    found = run(made(unit(planned("a"))), TraceRequest(2.0, "a", 20, 5))[0]
    # 20 ms of prefill give the first token, and four decode steps of 10 ms the others.
    assert found.status == "finished"
    assert found.first_token == pytest.approx(2.020)
    assert found.end == pytest.approx(2.060)
    assert (found.ttft, found.tpot, found.latency) == (
        pytest.approx(0.020),
        pytest.approx(0.010),
        pytest.approx(0.060),
    )
    assert (found.prompt_tokens, found.output_tokens, found.made_tokens) == (20, 5, 5)
    assert found.unit == "unit-0"


def test_units_run_at_the_same_time() -> None:
    one, two = unit(planned("a")), unit(planned("b"), name="unit-1")
    requests = [TraceRequest(0.0, "a", 20, 5), TraceRequest(0.0, "b", 20, 5)]
    apart = run(made(one, two), *requests)
    assert [apart[i].end for i in range(2)] == pytest.approx([0.060, 0.060])
    together = run(made(unit(planned("a"), planned("b"))), *requests)
    assert max(together[i].end or 0.0 for i in range(2)) == pytest.approx(0.120)


def test_replicas_share_the_requests() -> None:
    units = [unit(planned("a")), unit(planned("a"), name="unit-1")]
    found = run(made(*units), *[TraceRequest(0.0, "a", 20, 5) for _ in range(4)])
    assert sorted(record.unit for record in found.values()) == ["unit-0"] * 2 + ["unit-1"] * 2


def test_one_request_goes_to_the_quicker_replica() -> None:
    """As the engine's router has it, where the plan says how long requests take."""
    slow = unit(planned("a", batch=9.0, throughput=1.0))
    quick = unit(planned("a", batch=3.0, throughput=1.0), name="unit-1")
    spaced = [TraceRequest(float(second), "a", 20, 5) for second in range(3)]
    assert {record.unit for record in run(made(slow, quick), *spaced).values()} == {"unit-1"}
    at_once = [TraceRequest(0.0, "a", 20, 5) for _ in range(4)]
    taken = [record.unit for record in run(made(slow, quick), *at_once).values()]
    assert sorted(taken) == ["unit-0", "unit-1", "unit-1", "unit-1"]


def test_requests_that_do_not_fit_are_rejected_or_cut() -> None:
    found = run(
        made(unit(planned("a"))),
        TraceRequest(0.0, "a", 600, 5),
        TraceRequest(0.0, "a", 500, 50),
    )
    assert found[0].status == "rejected"
    assert "600 tokens" in found[0].reason
    assert found[0].latency is None
    assert found[1].status == "finished"
    assert found[1].made_tokens == 12  # 512 in all


def test_requests_beyond_the_queue_are_rejected() -> None:
    requests = [TraceRequest(0.0, "a", 20, 5) for _ in range(40)]
    found = run(made(unit(planned("a", max_batch=1))), *requests, max_waiting=3)
    rejected = [record for record in found.values() if record.status == "rejected"]
    assert len(rejected) == 36
    assert rejected[0].reason == "3 requests are waiting already"


def test_a_model_that_is_nowhere_is_an_error() -> None:
    with pytest.raises(WorkloadError, match="request 0 is for b, which is on no unit; there are a"):
        run(made(unit(planned("a"))), TraceRequest(0.0, "b", 1, 1))


@pytest.mark.parametrize(
    ("policy", "execution"),
    [
        ("adbs", "time_sliced"),
        ("fcfs", "time_sliced"),
        ("round_robin", "time_sliced"),
        ("temporal", "time_sliced"),
        ("adbs", "concurrent"),
        ("fcfs", "concurrent"),
        ("round_robin", "concurrent"),
        ("temporal", "concurrent"),
    ],
)
def test_all_requests_end_under_every_policy(policy: PolicyName, execution: Execution) -> None:
    # The pool holds 3,900 tokens and the requests together eight times as many.
    models = [planned(name, max_batch=64, decode_share=0.4) for name in ("a", "b", "c")]
    units = made(unit(*models, kv_bytes=2e6), policy=policy, execution=execution)
    traffic = [Traffic("a", 30.0), Traffic("b", 10.0), Traffic("c", 2.0)]
    requests = [
        TraceRequest(r.arrival, r.model, min(r.prompt_tokens, 200), 100)
        for r in SyntheticWorkload(traffic, count=120)
    ]
    found = run(units, *requests)
    assert {record.status for record in found.values()} == {"finished"}
    assert all(record.made_tokens == record.output_tokens for record in found.values())
    assert all((record.ttft or 0) > 0 for record in found.values())
    units[0].scheduler.check_invariants()
    assert units[0].scheduler.num_requests == 0
    assert units[0].executor.busy_seconds > 0


def test_the_same_again_is_the_same() -> None:
    workload = list(SyntheticWorkload([Traffic("a", 20.0)], count=100, seed=1))
    shorter = [TraceRequest(r.arrival, r.model, 20, 1 + r.output_tokens % 50) for r in workload]
    assert run(made(unit(planned("a"))), *shorter) == run(made(unit(planned("a"))), *shorter)


def test_side_by_side_is_faster_than_in_turn() -> None:
    models = [planned(name, decode_share=0.5) for name in ("a", "b")]

    class Cheap(SimpleCosts):
        """Half of the compute is enough for decoding."""

        def decode_seconds(
            self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
        ) -> float:
            return 1e-2

    ends = []
    for execution in ("concurrent", "time_sliced"):
        system = SystemConfig("adbs", execution, StepSizes(decode_tokens=1))
        one = build_simulated_unit(unit(*models), system, Cheap(), SHAPES, bandwidth=None)
        requests = [TraceRequest(0.0, name, 20, 100) for name in ("a", "b")]
        ends.append(max(record.end or 0.0 for record in run([one], *requests).values()))
    assert ends[0] < 0.6 * ends[1]
