"""Fleet files with models that sleep are rejected for a cluster."""

import pytest

from muxjax.cluster.fixed_models import check_models_stay_awake
from muxjax.cluster.host_list import Hosts
from muxjax.cluster.leader import lead_fleet
from muxjax.config.fleet_file import load_fleet_config
from muxjax.errors import FleetConfigError

SMALL = {"name": "small", "source": "demo:stories15m"}


def fleet(model: dict | None = None, **keys: object) -> dict:
    return {"models": [{**SMALL, **(model or {})}], "pool": {"memory": "1MB"}, **keys}


def test_models_that_stay_awake_are_accepted():
    check_models_stay_awake(load_fleet_config(fleet({"pinned": True})))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (fleet({"sleeping": True}), r"remove sleeping \(of small\)$"),
        (fleet({"idle_timeout": 5}), r"remove idle_timeout \(of small\)$"),
        (fleet({"sleeping": True}, idle_timeout=5), r"idle_timeout, sleeping \(of small\)$"),
    ],
)
def test_models_that_sleep_are_rejected(source, message):
    with pytest.raises(FleetConfigError, match=message):
        check_models_stay_awake(load_fleet_config(source))


def test_a_leader_checks_the_fleet_before_it_waits_for_followers():
    context = lead_fleet(fleet({"sleeping": True}), Hosts("127.0.0.1:1", 0, 2))
    with pytest.raises(FleetConfigError, match="sleep"), context:
        pass
