"""A plan's units served by one process that has eight devices."""

import json

import pytest

from tests import eight_devices
from tests.muxjax.on_eight_devices import KINDS, UNITS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report():
    printed = eight_devices.run("tests.muxjax.on_eight_devices", "plan_with_failures")
    return json.loads(printed.splitlines()[-1])


def test_models_are_placed_as_planned(report):
    assert report["devices"] == {name: list(devices) for name, (devices, _) in UNITS.items()}
    assert report["placed"] == {
        model: [name for name, (_, models) in UNITS.items() if model in models] for model in KINDS
    }
    assert all(abs(quota - 0.5) < 0.2 for quota in report["quotas"].values())


def test_requests_are_complete_and_unchanged_after_units_fail(report):
    assert report["restarts"] == dict.fromkeys(UNITS, 1)
    assert report["same"] is True
    assert report["lengths"] == [60]
    assert report["running at the end"] == 0
    assert sum(report["running when killed"].values()) > 0
