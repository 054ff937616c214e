"""A unit at the far end of a connection, which here is a few method calls."""

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
from muxjax.scheduling.scheduler import Scheduler
from muxjax.units.served_unit import ServedUnit
from tests.muxjax.engine.harness import WAIT, Collector
from tests.muxjax.engine.router_harness import PAGES, SPECS, Dying, alone, ask, requests_of
from tests.muxjax.scheduling.harness import request


class LocalPeer:
    """Everything goes through pickle, as it does between processes."""

    def __init__(self, host: UnitHost, engine: Engine) -> None:
        self._host, self._engine = host, engine
        self.cancelled: list[int] = []
        self.gone = threading.Event()

    def submit(self, asked: AddRequest) -> None:
        self._check()
        self._host.submit(pickle.loads(pickle.dumps(asked)))

    def cancel(self, request_id: int) -> None:
        self._check()
        self.cancelled.append(request_id)
        self._host.cancel(request_id)

    def poll(self, seconds: float) -> PollResult:
        result = self._host.poll(min(seconds, 0.05))
        self._check()  # what it says does not arrive
        return pickle.loads(pickle.dumps(result))

    def stats(self) -> dict[str, Any]:
        self._check()
        return self._host.stats()

    def end(self) -> None:
        self.gone.set()
        self._engine.abandon("killed")

    def _check(self) -> None:
        if self.gone.is_set():
            raise EngineDead("its process is gone")


class Remote:
    """A remote unit of mock devices.

    Attributes:
      peers: one for every start.
      ready: a start waits for it.
    """

    def __init__(self, name: str, models: str, *deaths: int) -> None:
        self.peers: list[LocalPeer] = []
        self.ready = threading.Event()
        self.ready.set()
        specs, left = [SPECS[model] for model in models], list(deaths)

        def start() -> Engine:
            unit = Scheduler(specs, PAGES, create_policy("adbs"))
            return Engine(unit, Dying(specs, PAGES, left))

        def connect(closing: threading.Event) -> tuple[LocalPeer, dict]:
            while not self.ready.wait(0.01):
                if closing.is_set():
                    raise EngineDead("closed while it was started")
            far = UnitSupervisor("far", models, start)
            host = UnitHost(far, {}, far.engine.stats)
            self.peers.append(LocalPeer(host, far.engine))
            return self.peers[-1], {}

        self.unit = RemoteUnit(name, dict.fromkeys(models, 1.0), connect)


@pytest.fixture
def remote():
    made = Remote("0", "ab")
    yield made
    made.unit.close()


def test_tokens_are_those_of_a_unit_here(remote: Remote):
    assert isinstance(remote.unit, ServedUnit)
    router = Router([remote.unit.supervisor])
    requests = requests_of("ab", 10, logprobs=1)
    for one, collector in zip(requests, ask(router, requests), strict=True):
        assert collector.error is None
        assert collector.tokens == alone(one)
        assert collector.reason == "length"
    assert remote.unit.stats()["requests"] == 0
    assert remote.unit.state()["restarts"] == 0
    router.close()


@pytest.mark.parametrize("deaths", [(0,), (3,), (2, 4)])
def test_a_death_of_its_loop_or_of_its_process_changes_no_token(deaths):
    made = Remote("0", "ab", *deaths)
    router = Router([made.unit])
    requests = requests_of("ab", 10)
    collectors = [Collector() for _ in requests]
    for one, collector in zip(requests, collectors, strict=True):
        router.submit(one, collector)
    until = time.monotonic() + WAIT
    while len(made.peers) <= len(deaths) and time.monotonic() < until:
        time.sleep(0.001)
    made.peers[-1].gone.set()  # as a process that is killed
    for one, collector in zip(requests, collectors, strict=True):
        assert collector.done.wait(WAIT)
        assert collector.error is None
        assert collector.tokens == alone(one)
    assert made.unit.restarts == len(made.peers) - 1 >= len(deaths)
    router.close()


def test_others_go_on_while_a_unit_is_started_anew():
    slow, other = Remote("slow", "a"), Remote("other", "b")
    router = Router([slow.unit, other.unit])
    slow.ready.clear()
    slow.peers[0].gone.set()
    waits = Collector()
    router.submit(request(1, "a", 5, 20), waits)
    (found,) = ask(router, [request(2, "b", 5, 20)])
    assert found.tokens == alone(request(2, "b", 5, 20))
    until = time.monotonic() + WAIT
    while not slow.unit.health().restarting and time.monotonic() < until:
        time.sleep(0.001)
    assert not slow.unit.alive
    unwanted = Collector()
    router.submit(request(3, "a", 5, 20), unwanted)
    router.cancel(3)
    assert unwanted.done.wait(WAIT)
    assert unwanted.reason == "cancelled"
    assert not waits.done.is_set()
    slow.ready.set()
    assert waits.done.wait(WAIT)
    assert waits.tokens == alone(request(1, "a", 5, 20))
    router.close()


def test_closing_ends_a_start():
    made = Remote("0", "a")
    router = Router([made.unit])
    made.ready.clear()
    made.peers[0].gone.set()
    waits = Collector()
    router.submit(request(1, "a", 5, 20), waits)
    router.close()
    assert waits.done.wait(WAIT)
    assert isinstance(waits.error, EngineDead)


def test_a_stop_string_and_a_cancellation_free_the_pages(remote: Remote):
    stops, dropped = Collector(stop_after=5), Collector()
    remote.unit.engine.submit(request(1, "a", 5, 40), stops)
    remote.unit.engine.submit(request(2, "a", 5, 40), dropped)
    remote.unit.engine.cancel(2)
    assert stops.done.wait(WAIT)
    assert dropped.done.wait(WAIT)
    assert (stops.reason, dropped.reason) == ("stop", "cancelled")
    until = time.monotonic() + WAIT
    while remote.unit.stats()["requests"] and time.monotonic() < until:
        time.sleep(0.001)
    assert remote.unit.stats()["requests"] == 0
    assert set(remote.peers[0].cancelled) == {1, 2}


def test_what_is_wrong_with_a_request_is_told(remote: Remote):
    (found,) = ask_unit(remote, request(1, "a", 70, 4))
    assert isinstance(found.error, InvalidRequest)
    assert remote.unit.alive


def ask_unit(remote: Remote, *requests) -> list[Collector]:
    collectors = [Collector() for _ in requests]
    for one, collector in zip(requests, collectors, strict=True):
        remote.unit.engine.submit(one, collector)
        assert collector.done.wait(WAIT)
    return collectors


def test_a_unit_that_hangs_is_replaced_once(remote: Remote):
    hung = Collector()
    held = threading.Event()
    far = remote.peers[0]._engine

    def hang() -> None:
        with contextlib.suppress(EngineDead):
            far.call(lambda _: held.wait(WAIT))

    threading.Thread(target=hang).start()
    remote.unit.engine.submit(request(1, "a", 5, 20), hung)
    until = time.monotonic() + WAIT
    while not remote.unit.health().stalled_seconds and time.monotonic() < until:
        time.sleep(0.001)
    threads = [threading.Thread(target=remote.unit.restart, args=("hung",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    held.set()
    assert hung.done.wait(WAIT)
    assert isinstance(hung.error, EngineDead)
    assert len(remote.peers) <= 4
    assert remote.unit.alive


def test_steps_cannot_be_recorded(remote: Remote):
    with pytest.raises(MuxError, match="cannot be recorded"):
        remote.unit.observe(lambda unit, step, result: None)


def test_errors_survive_the_way():
    for error in (InvalidRequest("bad", field="prompt"), Overloaded("full", retry_after=2.5)):
        found = pickle.loads(pickle.dumps(error))
        assert (str(found), vars(found)) == (str(error), vars(error))
