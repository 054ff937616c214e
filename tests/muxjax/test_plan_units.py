"""A plan's units served by one process, in one that has eight devices."""

import json

import pytest

from tests import eight_devices
from tests.muxjax.on_eight_devices import KINDS, UNITS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    printed = eight_devices.run("tests.muxjax.on_eight_devices", "plan_with_deaths")
    return json.loads(printed.splitlines()[-1])


def test_models_are_where_the_plan_puts_them(found):
    assert found["devices"] == {name: list(devices) for name, (devices, _) in UNITS.items()}
    assert found["placed"] == {
        model: [name for name, (_, models) in UNITS.items() if model in models] for model in KINDS
    }
    assert all(abs(quota - 0.5) < 0.2 for quota in found["quotas"].values())


def test_no_request_is_lost_when_units_die_and_no_token_changes(found):
    assert found["restarts"] == dict.fromkeys(UNITS, 1)
    assert found["same"] is True
    assert found["lengths"] == [60]
    assert found["left"] == 0
    assert sum(found["killed with"].values()) > 0
