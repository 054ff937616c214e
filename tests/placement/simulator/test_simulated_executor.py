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


def test_it_is_an_executor() -> None:
    assert isinstance(SimulatedExecutor(MODELS, SimpleCosts(), "time_sliced"), Executor)


def test_one_program_at_a_time() -> None:
    executor = SimulatedExecutor(MODELS, SimpleCosts(), "time_sliced")
    first = executor.submit(prefill("a", 10))
    second = executor.submit(prefill("b", 10))
    assert executor.next_end() == (pytest.approx(0.010), first)
    result = executor.result(first)
    assert (result.started, result.seconds) == (0.0, pytest.approx(0.010))
    result = executor.result(second)
    # Half of the time on two devices, after the first.
    assert (result.started, result.seconds) == (pytest.approx(0.010), pytest.approx(0.005))
    assert executor.now == pytest.approx(0.015)
    assert executor.busy_seconds == pytest.approx(0.015)
    executor.now = 1.0
    assert executor.result(executor.submit(decode("a", 1))).started == 1.0
    assert executor.next_end() is None


def test_a_batch_as_the_scheduler_makes_it_is_the_same_step() -> None:
    took = []
    for columns in (False, True):
        executor = SimulatedExecutor(MODELS, SimpleCosts(), "time_sliced")
        executor.result(executor.submit(prefill()))
        step = decode("a", 3, 1, tokens=3)
        if columns:
            step = Decode("a", DecodeBatch.from_sequences(step.sequences), 3)
        result = executor.result(executor.submit(step))
        took.append((result.tokens, result.seconds))
    assert took[0] == took[1]


def test_tokens_are_as_many_as_the_step_has() -> None:
    executor = SimulatedExecutor(MODELS, SimpleCosts(), "time_sliced")
    assert executor.result(executor.submit(prefill(last=False))).tokens == [[]]
    assert executor.result(executor.submit(prefill())).tokens == [[0]]
    result = executor.result(executor.submit(decode("a", 3, 1, tokens=3)))
    assert result.tokens == [[0, 0, 0], [0]]
    assert result.logprobs == [None, None]
    assert result.seconds == pytest.approx(0.030)


class Recorder(SimpleCosts):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, ...]] = []

    def prefill_seconds(
        self, model: str, num_tokens: float, length: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        self.asked.append((num_tokens, length))
        return super().prefill_seconds(model, num_tokens, length, tp=tp, share=share)

    def decode_seconds(
        self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        self.asked.append((batch, context))
        return super().decode_seconds(model, batch, context, tp=tp, share=share)


def test_costs_are_asked_for_what_the_sequences_hold() -> None:
    costs = Recorder()
    executor = SimulatedExecutor(MODELS, costs, "time_sliced")
    executor.result(executor.submit(prefill("a", 10, last=False)))
    executor.result(executor.submit(prefill("a", 20, start=10)))
    executor.result(executor.submit(decode("a", 1)))
    executor.result(executor.submit(decode("a", 3, tokens=4)))
    # The second chunk's tokens look at 10 to 30 others, as those of a prompt of 40 do on average.
    # The first decode writes token 31; then 32, 33, 34 in three of four rounds.
    assert costs.asked == [(10, 10), (20, 40), (1, 31), (1, 33)]


def test_copies_share_the_batch() -> None:
    costs = Recorder()
    executor = SimulatedExecutor({"a": SimulatedModel("small", replicas=2)}, costs, "time_sliced")
    executor.result(executor.submit(prefill("a", 10)))
    executor.result(executor.submit(decode("a", 1, 1, 1, 1)))
    assert costs.asked[0][0] == 5
    assert costs.asked[1][0] == 2


def concurrent(share: float, bandwidth: float | None = None) -> SimulatedExecutor:
    models = {
        name: SimulatedModel("small", prefill_share=share, decode_share=share) for name in "ab"
    }
    return SimulatedExecutor(models, SimpleCosts(), "concurrent", bandwidth=bandwidth)


def both(executor: SimulatedExecutor) -> tuple[SimulatedJob, SimulatedJob]:
    return executor.submit(prefill("a", 10)), executor.submit(prefill("b", 20))


def test_side_by_side_within_the_chip_nobody_waits() -> None:
    executor = concurrent(0.5)
    first, second = both(executor)
    assert executor.result(first).seconds == pytest.approx(0.020)
    assert executor.result(second).seconds == pytest.approx(0.040)
    assert executor.now == pytest.approx(0.040)


def test_side_by_side_beyond_the_chip_all_slow_down() -> None:
    executor = concurrent(1.0)
    first, second = both(executor)
    # 10 and 20 ms of work, at half speed until the first is done.
    assert executor.result(first).seconds == pytest.approx(0.020)
    assert executor.result(second).seconds == pytest.approx(0.030)


def test_side_by_side_memory_bandwidth_is_shared() -> None:
    # Weights of 1 MB and some KV in 20 ms: half of 100 MB/s and a little.
    executor = concurrent(0.5, bandwidth=100e6)
    executor.submit(prefill("a", 10))
    alone = executor.next_end()
    executor.submit(prefill("b", 10))
    together = executor.next_end()
    assert alone is not None
    assert together is not None
    assert alone[0] == pytest.approx(0.020)
    assert together[0] == pytest.approx(0.020 * 2 * (1e6 + 10 * 512) / 0.020 / 100e6)


def test_results_come_in_the_order_of_their_ends() -> None:
    executor = concurrent(0.5)
    first, second = both(executor)
    with pytest.raises(ValueError, match="order in which the steps end"):
        executor.result(second)
    executor.result(first)
    executor.close()
    assert executor.next_end() is None


def test_side_by_side_what_is_lent_counts() -> None:
    models = {name: SimulatedModel("small", prefill_share=0.5) for name in "ab"}
    compute = ComputeShares({("a", "prefill"): 0.5, ("b", "prefill"): 0.5})
    executor = SimulatedExecutor(models, SimpleCosts(), "concurrent", compute=compute)
    compute.lend(("a", "prefill"), [], [("a", "prefill")])
    first = executor.submit(prefill("a", 10))
    assert executor.next_end() == (pytest.approx(0.010), first)
    # The owner starts beside it; together they want 1.5 times the chip until the first is done.
    executor.now = 0.004
    compute.lend(("b", "prefill"), [("a", "prefill")], [("a", "prefill"), ("b", "prefill")])
    executor.submit(prefill("b", 10))
    assert executor.result(first).seconds == pytest.approx(0.004 + 1.5 * 0.006)
