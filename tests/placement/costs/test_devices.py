from __future__ import annotations

from dataclasses import replace

import pytest

from muxjax.errors import PlanError
from muxjax.placement.costs.cluster import Cluster, parse_cluster
from muxjax.placement.costs.devices import DEVICES, find_device


def test_presets_have_a_source() -> None:
    assert set(DEVICES) >= {"a100-80gb", "h100", "h200", "v5e", "v5p", "v6e", "tpu7x"}
    assert all(device.source for device in DEVICES.values())
    assert DEVICES["a100-80gb"].bandwidth == 2039e9
    assert DEVICES["v5e"].memory == 16 * 2**30


def test_the_local_machine_has_memory() -> None:
    assert find_device("cpu").memory > 1e9


def test_a_cluster_is_parsed() -> None:
    cluster = parse_cluster("4x8:a100-80gb, 2x4:v5e")
    assert str(cluster) == "4x8:a100-80gb,2x4:v5e"
    assert cluster.num_devices == 40
    assert cluster.groups[0].mesh_sizes() == (1, 2, 4, 8)
    assert parse_cluster("1x6:h100").groups[0].mesh_sizes() == (1, 2, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4x8", "NODESxDEVICES:DEVICE"),
        ("", "NODESxDEVICES:DEVICE"),
        ("0x8:h100", "at least one node"),
        ("4x8:a100-80", "did you mean a100-80gb"),
        ("1x1:abacus", "unknown device 'abacus'"),
    ],
)
def test_an_invalid_cluster_raises(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_cluster(text)


def test_invalid_devices_and_clusters_raise() -> None:
    with pytest.raises(PlanError, match="h100: bandwidth must be above 0, not nan"):
        replace(DEVICES["h100"], bandwidth=float("nan"))
    with pytest.raises(PlanError, match="launch_seconds"):
        replace(DEVICES["h100"], launch_seconds=-1.0)
    with pytest.raises(PlanError, match="at least one node"):
        Cluster(())
