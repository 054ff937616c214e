from __future__ import annotations

import pytest

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.placement.simulator.simulated_executor import (
    SimulatedExecutor,
    SimulatedJob,
    SimulatedModel,
)
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.steps import (
    Decode,
    DecodeBatch,
    DecodeSequence,
    Executor,
    Prefill,
    PrefillChunk,
)
from tests.placement.simple_costs import SimpleCosts

MODELS = {"a": SimulatedModel("small"), "b": SimulatedModel("small", tp=2)}


def prefill(model: str = "a", tokens: int = 10, *, start: int = 0, last: bool = True) -> Prefill:
    sampling = SamplingParams() if last else None
    return Prefill(
        model, [PrefillChunk(0, 0, (0,) * tokens, start, start + tokens, [], 0, sampling, 9)]
    )


def decode(model: str = "a", *counts: int, tokens: int = 1) -> Decode:
    sequences = [DecodeSequence(slot, slot, [], 0, count) for slot, count in enumerate(counts)]
    return Decode(model, sequences, tokens)


def test_it_implements_the_executor_protocol() -> None:
    assert isinstance(SimulatedExecutor(MODELS, SimpleCosts(), "time_sliced"), Executor)


def test_time_sliced_programs_run_one_after_the_other() -> None:
    executor = SimulatedExecutor(MODELS, SimpleCosts(), "time_sliced")
    first = executor.submit(prefill("a", 10))
    second = executor.submit(prefill("b", 10))
    assert executor.next_end() == (pytest.approx(0.010), first)
    result = executor.result(first)
    assert (result.started, result.seconds) == (0.0, pytest.approx(0.010))
    result = executor.result(second)
    # After the first, in half of the time on two devices.
    assert (result.started, result.seconds) == (pytest.approx(0.010), pytest.approx(0.005))
    assert executor.now == pytest.approx(0.015)
    assert executor.busy_seconds == pytest.approx(0.015)
    executor.now = 1.0
    assert executor.result(executor.submit(decode("a", 1))).started == 1.0
    assert executor.next_end() is None


def test_a_decode_batch_equals_a_list_of_sequences() -> None:
    results = []
    for columns in (False, True):
        executor = SimulatedExecutor(MODELS, SimpleCosts(), "time_sliced")
        executor.result(executor.submit(prefill()))
        step = decode("a", 3, 1, tokens=3)
        if columns:
            step = Decode("a", DecodeBatch.from_sequences(step.sequences), 3)
        result = executor.result(executor.submit(step))
        results.append((result.tokens, result.seconds))
    assert results[0] == results[1]


def test_results_have_the_tokens_of_the_step() -> None:
    executor = SimulatedExecutor(MODELS, SimpleCosts(), "time_sliced")
    assert executor.result(executor.submit(prefill(last=False))).tokens == [[]]
    assert executor.result(executor.submit(prefill())).tokens == [[0]]
    result = executor.result(executor.submit(decode("a", 3, 1, tokens=3)))
    assert result.tokens == [[0, 0, 0], [0]]
    assert result.logprobs == [None, None]
    assert result.seconds == pytest.approx(0.030)


class RecordingCosts(SimpleCosts):
    """Records the arguments of all calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, ...]] = []

    def prefill_seconds(
        self, model: str, num_tokens: float, length: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        self.calls.append((num_tokens, length))
        return super().prefill_seconds(model, num_tokens, length, tp=tp, share=share)

    def decode_seconds(
        self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        self.calls.append((batch, context))
        return super().decode_seconds(model, batch, context, tp=tp, share=share)


def test_costs_depend_on_the_contexts_of_the_sequences() -> None:
    costs = RecordingCosts()
    executor = SimulatedExecutor(MODELS, costs, "time_sliced")
    executor.result(executor.submit(prefill("a", 10, last=False)))
    executor.result(executor.submit(prefill("a", 20, start=10)))
    executor.result(executor.submit(decode("a", 1)))
    executor.result(executor.submit(decode("a", 3, tokens=4)))
    # The second chunk attends to 10 to 30 tokens, on average as many as a prompt of 40.
    # The first decode writes token 31; then 32, 33, 34 in three of four rounds.
    assert costs.calls == [(10, 10), (20, 40), (1, 31), (1, 33)]


def test_replicas_share_the_batch() -> None:
    costs = RecordingCosts()
    executor = SimulatedExecutor({"a": SimulatedModel("small", replicas=2)}, costs, "time_sliced")
    executor.result(executor.submit(prefill("a", 10)))
    executor.result(executor.submit(decode("a", 1, 1, 1, 1)))
    assert costs.calls[0][0] == 5
    assert costs.calls[1][0] == 2


def concurrent(share: float, bandwidth: float | None = None) -> SimulatedExecutor:
    models = {
        name: SimulatedModel("small", prefill_share=share, decode_share=share) for name in "ab"
    }
    return SimulatedExecutor(models, SimpleCosts(), "concurrent", bandwidth=bandwidth)


def submit_two_prefills(executor: SimulatedExecutor) -> tuple[SimulatedJob, SimulatedJob]:
    return executor.submit(prefill("a", 10)), executor.submit(prefill("b", 20))


def test_concurrent_programs_within_the_compute_run_at_full_speed() -> None:
    executor = concurrent(0.5)
    first, second = submit_two_prefills(executor)
    assert executor.result(first).seconds == pytest.approx(0.020)
    assert executor.result(second).seconds == pytest.approx(0.040)
    assert executor.now == pytest.approx(0.040)


def test_concurrent_programs_beyond_the_compute_slow_down() -> None:
    executor = concurrent(1.0)
    first, second = submit_two_prefills(executor)
    # 10 and 20 ms of work, at half speed until the first ends.
    assert executor.result(first).seconds == pytest.approx(0.020)
    assert executor.result(second).seconds == pytest.approx(0.030)


def test_concurrent_programs_share_the_memory_bandwidth() -> None:
    # Weights of 1 MB and some KV in 20 ms: slightly more than half of 100 MB/s.
    executor = concurrent(0.5, bandwidth=100e6)
    executor.submit(prefill("a", 10))
    isolated = executor.next_end()
    executor.submit(prefill("b", 10))
    concurrent_end = executor.next_end()
    assert isolated is not None
    assert concurrent_end is not None
    assert isolated[0] == pytest.approx(0.020)
    assert concurrent_end[0] == pytest.approx(0.020 * 2 * (1e6 + 10 * 512) / 0.020 / 100e6)


def test_results_must_be_requested_in_the_order_of_their_ends() -> None:
    executor = concurrent(0.5)
    first, second = submit_two_prefills(executor)
    with pytest.raises(ValueError, match="order in which the steps end"):
        executor.result(second)
    executor.result(first)
    executor.close()
    assert executor.next_end() is None


def test_lent_shares_count_as_compute_in_use() -> None:
    models = {name: SimulatedModel("small", prefill_share=0.5) for name in "ab"}
    compute = ComputeShares({("a", "prefill"): 0.5, ("b", "prefill"): 0.5})
    executor = SimulatedExecutor(models, SimpleCosts(), "concurrent", compute=compute)
    compute.lend(("a", "prefill"), [], [("a", "prefill")])
    first = executor.submit(prefill("a", 10))
    assert executor.next_end() == (pytest.approx(0.010), first)
    # The owner starts; together they need 1.5 times the compute until the first ends.
    executor.now = 0.004
    compute.lend(("b", "prefill"), [("a", "prefill")], [("a", "prefill"), ("b", "prefill")])
    executor.submit(prefill("b", 10))
    assert executor.result(first).seconds == pytest.approx(0.004 + 1.5 * 0.006)
