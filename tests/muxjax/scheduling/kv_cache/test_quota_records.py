from __future__ import annotations

from muxjax.scheduling.kv_cache.quota_records import QuotaMove, Reclaim


def test_a_quota_move_as_the_statistics_show_it() -> None:
    assert QuotaMove(3.0, "a", "b", 8, "unused", 0.25, 1.0).as_dict() == {
        "at": 3.0,
        "from": "a",
        "to": "b",
        "pages": 8,
        "reason": "unused",
        "from_use": 0.25,
        "to_use": 1.0,
    }


def test_a_reclaim_as_the_statistics_show_it() -> None:
    assert Reclaim(4.5, "a", "b", 12, 2, "growth").as_dict() == {
        "at": 4.5,
        "from": "a",
        "to": "b",
        "pages": 12,
        "requests": 2,
        "reason": "growth",
    }
