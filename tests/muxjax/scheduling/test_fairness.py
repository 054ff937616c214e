from __future__ import annotations

import pytest

from muxjax.scheduling.fairness import jain_index


def test_jain_index() -> None:
    assert jain_index([3.0, 3.0]) == pytest.approx(1)
    assert jain_index([3.0, 0.0, 0.0]) == pytest.approx(1 / 3)
    assert jain_index(iter([1.0, 2.0])) == pytest.approx(0.9)


def test_jain_index_is_not_defined_without_values() -> None:
    assert jain_index([]) is None
    assert jain_index([0.0, 0.0]) is None
