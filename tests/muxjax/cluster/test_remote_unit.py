"""A remote unit, with a connection inside this process."""

import contextlib
import pickle
import threading
import time
from typing import Any

import pytest

from muxjax.cluster.messages import AddRequest, PollResult
from muxjax.cluster.remote_unit import RemoteUnit
from muxjax.cluster.unit_host import UnitHost
from muxjax.engine.engine import Engine
from muxjax.engine.router import Router
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.errors import EngineDead, InvalidRequest, MuxError, Overloaded
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.routing import PlannedLoad
from muxjax.scheduling.scheduler import Scheduler
from muxjax.units.served_unit import ServedUnit
from tests.muxjax.engine.harness import WAIT, Collector
from tests.muxjax.engine.router_harness import PAGES, SPECS, Dying, alone, ask, requests_of
from tests.muxjax.scheduling.harness import request


class LocalPeer:
    """A connection to a unit host in this process. Pickles all messages, as between processes."""

    def __init__(self, host: UnitHost, engine: Engine) -> None:
        self._host, self._engine = host, engine
        self.cancelled: list[int] = []
        self.killed = threading.Event()

    def submit(self, message: AddRequest) -> None:
        self._check()
        self._host.submit(pickle.loads(pickle.dumps(message)))

    def cancel(self, request_id: int) -> None:
        self._check()
        self.cancelled.append(request_id)
        self._host.cancel(request_id)

    def poll(self, seconds: float) -> PollResult:
        result = self._host.poll(min(seconds, 0.05))
        self._check()  # a killed process returns nothing
        return pickle.loads(pickle.dumps(result))

    def stats(self) -> dict[str, Any]:
        self._check()
        return self._host.stats()

    def end(self) -> None:
        self.killed.set()
        self._engine.abandon("killed")

    def _check(self) -> None:
        if self.killed.is_set():
            raise EngineDead("its process is gone")


class Remote:
    """A remote unit of mock devices.

    Attributes:
      peers: the connection of each start.
      ready: a start waits until it is set.
    """

    def __init__(self, name: str, models: str, *deaths: int) -> None:
        self.peers: list[LocalPeer] = []
        self.ready = threading.Event()
        self.ready.set()
        specs, remaining_deaths = [SPECS[model] for model in models], list(deaths)

        def start() -> Engine:
            scheduler = Scheduler(specs, PAGES, create_policy("adbs"))
            return Engine(scheduler, Dying(specs, PAGES, remaining_deaths))

        def connect(closing: threading.Event) -> tuple[LocalPeer, dict]:
            while not self.ready.wait(0.01):
                if closing.is_set():
                    raise EngineDead("closed while it was started")
            supervisor = UnitSupervisor("remote", models, start)
            host = UnitHost(supervisor, {}, supervisor.engine.stats)
            self.peers.append(LocalPeer(host, supervisor.engine))
            return self.peers[-1], {}

        self.unit = RemoteUnit(name, models, PlannedLoad(), connect)


@pytest.fixture
def remote():
    unit = Remote("0", "ab")
    yield unit
    unit.unit.close()


def test_tokens_match_those_of_a_local_unit(remote: Remote):
    assert isinstance(remote.unit, ServedUnit)
    router = Router([remote.unit.supervisor])
    requests = requests_of("ab", 10, logprobs=1)
    for submitted, collector in zip(requests, ask(router, requests), strict=True):
        assert collector.error is None
        assert collector.tokens == alone(submitted)
        assert collector.reason == "length"
    assert remote.unit.stats()["requests"] == 0
    assert remote.unit.state()["restarts"] == 0
    router.close()


@pytest.mark.parametrize("deaths", [(0,), (3,), (2, 4)])
def test_tokens_are_unchanged_after_the_loss_of_the_engine_or_the_process(deaths):
    remote = Remote("0", "ab", *deaths)
    router = Router([remote.unit])
    requests = requests_of("ab", 10)
    collectors = [Collector() for _ in requests]
    for submitted, collector in zip(requests, collectors, strict=True):
        router.submit(submitted, collector)
    deadline = time.monotonic() + WAIT
    while len(remote.peers) <= len(deaths) and time.monotonic() < deadline:
        time.sleep(0.001)
    remote.peers[-1].killed.set()
    for submitted, collector in zip(requests, collectors, strict=True):
        assert collector.done.wait(WAIT)
        assert collector.error is None
        assert collector.tokens == alone(submitted)
    assert remote.unit.restarts == len(remote.peers) - 1 >= len(deaths)
    router.close()


def test_other_units_serve_while_a_unit_restarts():
    slow, other = Remote("slow", "a"), Remote("other", "b")
    router = Router([slow.unit, other.unit])
    slow.ready.clear()
    slow.peers[0].killed.set()
    waiting = Collector()
    router.submit(request(1, "a", 5, 20), waiting)
    (served,) = ask(router, [request(2, "b", 5, 20)])
    assert served.tokens == alone(request(2, "b", 5, 20))
    deadline = time.monotonic() + WAIT
    while not slow.unit.health().restarting and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not slow.unit.alive
    cancelled = Collector()
    router.submit(request(3, "a", 5, 20), cancelled)
    router.cancel(3)
    assert cancelled.done.wait(WAIT)
    assert cancelled.reason == "cancelled"
    assert not waiting.done.is_set()
    slow.ready.set()
    assert waiting.done.wait(WAIT)
    assert waiting.tokens == alone(request(1, "a", 5, 20))
    router.close()


def test_closing_ends_a_restart():
    remote = Remote("0", "a")
    router = Router([remote.unit])
    remote.ready.clear()
    remote.peers[0].killed.set()
    waiting = Collector()
    router.submit(request(1, "a", 5, 20), waiting)
    router.close()
    assert waiting.done.wait(WAIT)
    assert isinstance(waiting.error, EngineDead)


def test_stop_strings_and_cancellation_free_the_pages(remote: Remote):
    stopped, cancelled = Collector(stop_after=5), Collector()
    remote.unit.engine.submit(request(1, "a", 5, 40), stopped)
    remote.unit.engine.submit(request(2, "a", 5, 40), cancelled)
    remote.unit.engine.cancel(2)
    assert stopped.done.wait(WAIT)
    assert cancelled.done.wait(WAIT)
    assert (stopped.reason, cancelled.reason) == ("stop", "cancelled")
    deadline = time.monotonic() + WAIT
    while remote.unit.stats()["requests"] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert remote.unit.stats()["requests"] == 0
    assert set(remote.peers[0].cancelled) == {1, 2}


def test_invalid_requests_fail_with_their_error(remote: Remote):
    collector = Collector()
    remote.unit.engine.submit(request(1, "a", 70, 4), collector)
    assert collector.done.wait(WAIT)
    assert isinstance(collector.error, InvalidRequest)
    assert remote.unit.alive


def test_a_hanging_unit_is_replaced_once(remote: Remote):
    hung = Collector()
    released = threading.Event()
    engine = remote.peers[0]._engine

    def hang() -> None:
        with contextlib.suppress(EngineDead):
            engine.call(lambda _: released.wait(WAIT))

    threading.Thread(target=hang).start()
    remote.unit.engine.submit(request(1, "a", 5, 20), hung)
    deadline = time.monotonic() + WAIT
    while not remote.unit.health().stalled_seconds and time.monotonic() < deadline:
        time.sleep(0.001)
    threads = [threading.Thread(target=remote.unit.restart, args=("hung",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    released.set()
    assert hung.done.wait(WAIT)
    assert isinstance(hung.error, EngineDead)
    assert len(remote.peers) <= 4
    assert remote.unit.alive


def test_steps_cannot_be_recorded(remote: Remote):
    with pytest.raises(MuxError, match="cannot be recorded"):
        remote.unit.observe(lambda unit, step, result: None)


def test_errors_are_pickled_with_their_attributes():
    for error in (InvalidRequest("bad", field="prompt"), Overloaded("full", retry_after=2.5)):
        restored = pickle.loads(pickle.dumps(error))
        assert (str(restored), vars(restored)) == (str(error), vars(error))
