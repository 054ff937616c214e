from __future__ import annotations

from dataclasses import replace

import pytest

from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.devices import DEVICES
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.roofline import COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY, Roofline
from tests.placement.data import a100_profile
from tests.placement.fleets import SHAPES

A100 = replace(DEVICES["a100-80gb"], launch_seconds=0.0)


def test_a_roofline_implements_the_protocol_of_planning_costs() -> None:
    costs = Roofline(SHAPES, A100)
    assert isinstance(costs, PlanningCosts)
    assert costs.tp_sizes("llama-30b") == (1, 2, 4)
    assert costs.tp_sizes("llama3-8b") == (1, 2, 4, 8)


def test_decoding_one_sequence_takes_the_time_to_read_the_weights() -> None:
    costs = Roofline(SHAPES, A100)
    shape = SHAPES["llama-7b"]
    read = shape.weight_bytes() - shape.head_params * 2 + 100 * shape.kv_bytes_per_token()
    seconds = read / (A100.bandwidth * MEMORY_EFFICIENCY)
    assert costs.decode_seconds("llama-7b", 1, 100) == pytest.approx(seconds)
    # A tied embedding is also read as the output head.
    assert costs.decode_seconds("llama3-1b", 1, 0) == pytest.approx(
        SHAPES["llama3-1b"].weight_bytes() / (A100.bandwidth * MEMORY_EFFICIENCY)
    )


def test_a_long_prefill_is_compute_bound() -> None:
    costs = Roofline(SHAPES, A100)
    tokens = 4096
    operations = 2 * SHAPES["llama-7b"].layer_params * tokens
    seconds = operations / (A100.flops * COMPUTE_EFFICIENCY)
    assert costs.prefill_seconds("llama-7b", tokens, 64) == pytest.approx(seconds, rel=0.05)
    assert costs.prefill_seconds("llama-7b", tokens, 4096) > 1.05 * seconds  # attention
    assert costs.prefill_seconds("llama-7b", 0, 64) == 0


def test_the_speedup_of_more_devices_is_sublinear() -> None:
    costs = Roofline(SHAPES, DEVICES["a100-80gb"])
    times = [costs.decode_seconds("llama-7b", 8, 300, tp=tp) for tp in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert times[3] > times[0] / 8


def test_a_smaller_share_is_slower() -> None:
    costs = Roofline(SHAPES, A100)
    assert costs.decode_seconds("llama-7b", 8, 300, share=0.3) > costs.decode_seconds(
        "llama-7b", 8, 300
    )
    with pytest.raises(ValueError, match="share"):
        costs.decode_seconds("llama-7b", 8, 300, share=1.5)


def test_times_are_close_to_the_a100_profile() -> None:
    """The roofline is not fitted, and the profiled engine had no CUDA graphs: wide tolerances."""
    table, costs = ProfileTable(a100_profile()), Roofline(SHAPES, DEVICES["a100-80gb"])
    for model, tp in (("llama-7b", 1), ("llama-13b", 1), ("llama-30b", 2), ("llama-65b", 4)):
        for batch in (1, 16, 64):
            ratio = costs.decode_seconds(model, batch, 256, tp=tp) / table.decode_seconds(
                model, batch, 256, tp=tp
            )
            assert 0.5 < ratio < 1.2
        ratio = costs.prefill_seconds(model, 64 * 128, 128, tp=tp) / table.prefill_seconds(
            model, 64 * 128, 128, tp=tp
        )
        assert 0.8 < ratio < 1.2
