"""What a fleet file asks of a plan."""

from __future__ import annotations

from typing import Any

import pytest

from muxjax.config.fleet_file import FleetConfig
from muxjax.errors import FleetConfigError, PlanError
from muxjax.placement.planner.planner import plan_placement
from muxjax.units.plan_inputs import plan_inputs

CONTEXT = 131_072


def fleet(**more: Any) -> FleetConfig:
    """A 7B with half a megabyte of cache a token: 64 GiB for a request of full length."""
    model = {
        "name": "long",
        "source": "config:llama",
        "config": {"max_position_embeddings": CONTEXT},
        **more,
    }
    return FleetConfig(cluster="1x1:h100", models=[model])


def test_the_longest_request_is_what_the_file_says() -> None:
    assert plan_inputs(fleet(max_model_len=4096)).loads[0].longest == 4096
    # Where it says nothing, the engine chooses what the pool holds.
    assert plan_inputs(fleet()).loads[0].longest is None


def test_no_plan_has_a_pool_that_the_engine_would_refuse() -> None:
    for length, fits in ((None, True), (CONTEXT // 4, True), (CONTEXT, False)):
        inputs = plan_inputs(fleet(max_model_len=length))
        if fits:
            assert plan_placement(inputs.loads, inputs.cluster, inputs.costs).units
        else:
            with pytest.raises(PlanError):
                plan_placement(inputs.loads, inputs.cluster, inputs.costs)


def test_a_length_beyond_the_context_is_refused() -> None:
    with pytest.raises(FleetConfigError, match=r"max_model_len of long is 131073;.*is 131072"):
        plan_inputs(fleet(max_model_len=CONTEXT + 1))
