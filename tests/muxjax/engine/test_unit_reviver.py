"""Restarts of dead units, with units that fail on demand."""

from __future__ import annotations

import threading

import pytest

from muxjax.engine import unit_reviver
from muxjax.engine.engine import Engine
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.engine.unit_reviver import UnitReviver
from tests.muxjax.engine.harness import WAIT, make_engine


class Unit(UnitSupervisor[Engine]):
    """A unit whose starts raise `fault` if it is set."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        super().__init__("0", "ab", self._start_or_fail)

    def _start_or_fail(self) -> Engine:
        if self.fault is not None:
            raise self.fault
        return make_engine()


@pytest.fixture
def settled() -> threading.Semaphore:
    return threading.Semaphore(0)


@pytest.fixture
def reviver(settled: threading.Semaphore) -> UnitReviver:
    return UnitReviver(on_settled=settled.release)


def test_a_dead_unit_is_restarted(reviver: UnitReviver, settled: threading.Semaphore) -> None:
    unit = Unit()
    assert reviver.revive(unit)
    assert unit.restarts == 0  # it was alive
    unit.engine.abandon("test")
    assert reviver.revive(unit)
    assert settled.acquire(timeout=WAIT)
    reviver.join()
    assert unit.alive
    assert (unit.restarts, reviver.failure("0")) == (1, None)
    unit.close()


def test_unit_that_cannot_be_restarted_fails_permanently(
    reviver: UnitReviver, settled: threading.Semaphore
) -> None:
    unit = Unit()
    unit.fault = RuntimeError("no device")
    unit.engine.abandon("test")
    assert reviver.revive(unit)
    assert settled.acquire(timeout=WAIT)
    reviver.join()
    assert str(reviver.failure("0")) == "no device"
    assert not reviver.revive(unit)
    unit.close()


def test_unit_that_dies_too_often_fails_permanently(
    reviver: UnitReviver, settled: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_reviver, "MAX_DEATHS", 1)
    unit = Unit()
    unit.engine.abandon("test")
    assert reviver.revive(unit)
    assert settled.acquire(timeout=WAIT)
    reviver.join()
    unit.engine.abandon("test")
    assert not reviver.revive(unit)
    assert "died 2 times in 60 seconds" in str(reviver.failure("0"))
    unit.close()
