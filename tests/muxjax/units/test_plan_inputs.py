"""Inputs of planning from a fleet file."""

from __future__ import annotations

from typing import Any

import pytest

from muxjax.config.fleet_file import FleetConfig
from muxjax.errors import FleetConfigError, PlanError
from muxjax.placement.planner.planner import plan_placement
from muxjax.units.plan_inputs import plan_inputs

CONTEXT = 131_072


def fleet(**settings: Any) -> FleetConfig:
    """A 7B model with 512 KiB of KV cache per token: 64 GiB for a full-length request."""
    model = {
        "name": "long",
        "source": "config:llama",
        "config": {"max_position_embeddings": CONTEXT},
        **settings,
    }
    return FleetConfig(cluster="1x1:h100", models=[model])


def test_longest_request_is_max_model_len() -> None:
    assert plan_inputs(fleet(max_model_len=4096)).loads[0].longest == 4096
    # Without max_model_len the engine chooses a length that fits the pool.
    assert plan_inputs(fleet()).loads[0].longest is None


def test_plan_has_a_pool_for_the_longest_request() -> None:
    for length, fits in ((None, True), (CONTEXT // 4, True), (CONTEXT, False)):
        inputs = plan_inputs(fleet(max_model_len=length))
        if fits:
            assert plan_placement(inputs.loads, inputs.cluster, inputs.costs).units
        else:
            with pytest.raises(PlanError):
                plan_placement(inputs.loads, inputs.cluster, inputs.costs)


def test_length_beyond_the_context_is_rejected() -> None:
    with pytest.raises(FleetConfigError, match=r"max_model_len of long is 131073;.*is 131072"):
        plan_inputs(fleet(max_model_len=CONTEXT + 1))
