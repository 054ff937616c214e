"""Merged statistics of several units."""

from muxjax.units.fleet_stats import merge_stats


def unit(devices: list[int], **models: dict) -> dict:
    return {
        "policy": "adbs",
        "requests": 2,
        "pool_pages": 10,
        "usable_pages": 9,
        "free_pages": 4,
        "cached_pages": 1,
        "restarts": 1,
        "steps": {"prefill": 3, "decode": 5},
        "devices": devices,
        "pool_bytes": 100,
        "programs": [{"model": name} for name in models],
        "models": models,
    }


def model(running: int, share: float) -> dict:
    return {"running": running, "decode_share": share, "decode_seconds": 0.5}


def test_merge_adds_counters_and_drops_shares():
    units = {
        "wide": unit([0, 1], a=model(2, 0.5), b=model(1, 0.5)),
        "right": unit([2], b=model(3, 1.0)),
    }
    merged = merge_stats(units)
    assert merged["units"] == units
    assert (merged["requests"], merged["free_pages"], merged["restarts"]) == (4, 8, 2)
    assert merged["pool_bytes"] == 300
    assert merged["steps"] == {"prefill": 6, "decode": 10}
    assert merged["models"]["a"] == {**model(2, 0.5), "units": ["wide"]}
    assert merged["models"]["b"] == {
        "running": 4,
        "decode_seconds": 1.0,
        "units": ["wide", "right"],
    }
    assert [program["model"] for program in merged["programs"]] == ["a", "b", "b"]
    assert units["right"]["models"]["b"] == model(3, 1.0)
