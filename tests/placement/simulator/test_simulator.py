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


def build_units(
    *units: PlannedUnit,
    policy: PolicyName = "adbs",
    execution: Execution = "time_sliced",
    decode_tokens: int = 1,
) -> list[UnitSimulation]:
    system = SystemConfig(policy, execution, StepSizes(decode_tokens=decode_tokens))
    return [
        build_simulated_unit(unit, system, SimpleCosts(), SHAPES, bandwidth=None) for unit in units
    ]


def run(
    units: list[UnitSimulation], *requests: TraceRequest, max_waiting: int | None = None
) -> dict[int, RequestRecord]:
    records: list[RequestRecord] = []
    Simulation(units, max_waiting=max_waiting).run(requests, records.append)
    assert len({record.id for record in records}) == len(requests)
    return {record.id: record for record in records}


def test_a_single_request_takes_the_time_of_the_cost_model() -> None:
    record = run(build_units(unit(planned("a"))), TraceRequest(2.0, "a", 20, 5))[0]
    # A prefill of 20 ms generates the first token, four decode steps of 10 ms the others.
    assert record.status == "finished"
    assert record.first_token == pytest.approx(2.020)
    assert record.end == pytest.approx(2.060)
    assert (record.ttft, record.tpot, record.latency) == (
        pytest.approx(0.020),
        pytest.approx(0.010),
        pytest.approx(0.060),
    )
    assert (record.prompt_tokens, record.output_tokens, record.made_tokens) == (20, 5, 5)
    assert record.unit == "unit-0"


def test_units_run_in_parallel() -> None:
    first, second = unit(planned("a")), unit(planned("b"), name="unit-1")
    requests = [TraceRequest(0.0, "a", 20, 5), TraceRequest(0.0, "b", 20, 5)]
    separate = run(build_units(first, second), *requests)
    assert [separate[i].end for i in range(2)] == pytest.approx([0.060, 0.060])
    shared = run(build_units(unit(planned("a"), planned("b"))), *requests)
    assert max(shared[i].end or 0.0 for i in range(2)) == pytest.approx(0.120)


def test_requests_are_divided_among_replicas() -> None:
    units = [unit(planned("a")), unit(planned("a"), name="unit-1")]
    records = run(build_units(*units), *[TraceRequest(0.0, "a", 20, 5) for _ in range(4)])
    assert sorted(record.unit for record in records.values()) == ["unit-0"] * 2 + ["unit-1"] * 2


def test_a_request_goes_to_the_faster_replica() -> None:
    """By the rule of the engine's router and the planned durations."""
    slow = unit(planned("a", batch=9.0, throughput=1.0))
    fast = unit(planned("a", batch=3.0, throughput=1.0), name="unit-1")
    spaced = [TraceRequest(float(second), "a", 20, 5) for second in range(3)]
    assert {record.unit for record in run(build_units(slow, fast), *spaced).values()} == {"unit-1"}
    at_once = [TraceRequest(0.0, "a", 20, 5) for _ in range(20)]
    units = [record.unit for record in run(build_units(slow, fast), *at_once).values()]
    assert units.count("unit-1") >= units.count("unit-0") > 0


def test_requests_that_do_not_fit_are_rejected_or_truncated() -> None:
    records = run(
        build_units(unit(planned("a"))),
        TraceRequest(0.0, "a", 600, 5),
        TraceRequest(0.0, "a", 500, 50),
    )
    assert records[0].status == "rejected"
    assert "600 tokens" in records[0].reason
    assert records[0].latency is None
    assert records[1].status == "finished"
    assert records[1].made_tokens == 12  # 512 tokens in total


def test_requests_beyond_the_queue_limit_are_rejected() -> None:
    requests = [TraceRequest(0.0, "a", 20, 5) for _ in range(40)]
    records = run(build_units(unit(planned("a", max_batch=1))), *requests, max_waiting=3)
    rejected = [record for record in records.values() if record.status == "rejected"]
    assert len(rejected) == 36
    assert rejected[0].reason == "3 requests are waiting already"


def test_a_request_for_a_model_on_no_unit_raises() -> None:
    with pytest.raises(WorkloadError, match="is for b, which is on no unit; the units have a"):
        run(build_units(unit(planned("a"))), TraceRequest(0.0, "b", 1, 1))


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
def test_all_requests_finish_under_every_policy(policy: PolicyName, execution: Execution) -> None:
    # The pool has 3,900 tokens; all requests shared need eight times as many.
    models = [planned(name, max_batch=64, decode_share=0.4) for name in ("a", "b", "c")]
    units = build_units(unit(*models, kv_bytes=2e6), policy=policy, execution=execution)
    traffic = [Traffic("a", 30.0), Traffic("b", 10.0), Traffic("c", 2.0)]
    requests = [
        TraceRequest(r.arrival, r.model, min(r.prompt_tokens, 200), 100)
        for r in SyntheticWorkload(traffic, count=120)
    ]
    records = run(units, *requests)
    assert {record.status for record in records.values()} == {"finished"}
    assert all(record.made_tokens == record.output_tokens for record in records.values())
    assert all((record.ttft or 0) > 0 for record in records.values())
    units[0].scheduler.check_invariants()
    assert units[0].scheduler.num_requests == 0
    assert units[0].executor.busy_seconds > 0


def test_results_are_deterministic() -> None:
    workload = list(SyntheticWorkload([Traffic("a", 20.0)], count=100, seed=1))
    shorter = [TraceRequest(r.arrival, r.model, 20, 1 + r.output_tokens % 50) for r in workload]
    assert run(build_units(unit(planned("a"))), *shorter) == run(
        build_units(unit(planned("a"))), *shorter
    )


def test_concurrent_execution_is_faster_than_time_slicing() -> None:
    models = [planned(name, decode_share=0.5) for name in ("a", "b")]

    class Cheap(SimpleCosts):
        """Decode steps take 10 ms with any compute share."""

        def decode_seconds(
            self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
        ) -> float:
            return 1e-2

    ends = []
    for execution in ("concurrent", "time_sliced"):
        system = SystemConfig("adbs", execution, StepSizes(decode_tokens=1))
        built = build_simulated_unit(unit(*models), system, Cheap(), SHAPES, bandwidth=None)
        requests = [TraceRequest(0.0, name, 20, 100) for name in ("a", "b")]
        ends.append(max(record.end or 0.0 for record in run([built], *requests).values()))
    assert ends[0] < 0.6 * ends[1]
