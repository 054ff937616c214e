"""The router over units on mock executors: placement, recovery of dead units, held models."""

import threading
from collections.abc import Callable

import pytest

from muxjax.engine import router as routing
from muxjax.engine import unit_reviver
from muxjax.engine.engine import Engine
from muxjax.engine.router import Router
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.errors import EngineDead, ModelUnavailable, UnknownModel
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.routing import PlannedLoad
from muxjax.scheduling.scheduler import Scheduler
from tests.muxjax.engine.harness import WAIT, Collector
from tests.muxjax.engine.router_harness import PAGES, SPECS, Dying, alone, ask, requests_of
from tests.muxjax.scheduling.harness import request


def make_supervisor(
    name: str, models: str, *deaths: int, planned_load: PlannedLoad | None = None
) -> UnitSupervisor:
    """A unit whose engines die at these steps, one engine after the other."""
    specs, remaining = [SPECS[model] for model in models], list(deaths)

    def start() -> Engine:
        scheduler = Scheduler(specs, PAGES, create_policy("adbs"))
        return Engine(scheduler, Dying(specs, PAGES, remaining))

    return UnitSupervisor(name, models, start, planned_load)


@pytest.fixture
def create_router():
    """Creates routers, and closes them after the test."""
    routers: list[Router] = []

    def create(*units: UnitSupervisor) -> Router:
        routers.append(Router(units))
        return routers[-1]

    yield create
    for router in routers:
        router.close()


@pytest.mark.parametrize("deaths", [(0,), (3,), (2, 4), (1, 0, 5)])
def test_unit_death_loses_no_request_and_changes_no_token(
    create_router: Callable[..., Router], deaths
):
    unit = make_supervisor("0", "ab", *deaths)
    requests = requests_of("ab", 10)
    for one, collector in zip(requests, ask(create_router(unit), requests), strict=True):
        assert collector.error is None
        assert collector.tokens == alone(one)
        assert collector.reason == "length"
    assert unit.restarts == len(deaths)


def test_requests_of_a_dead_unit_continue_on_its_replica(create_router: Callable[..., Router]):
    dies, lives = make_supervisor("dies", "a", 3), make_supervisor("lives", "ab")
    requests = requests_of("a", 12)
    for one, collector in zip(requests, ask(create_router(dies, lives), requests), strict=True):
        assert collector.tokens == alone(one)


def test_unit_with_the_shortest_expected_duration_is_chosen(create_router: Callable[..., Router]):
    slow = make_supervisor("slow", "ab", planned_load=PlannedLoad({"a": 3.0, "b": 3.0}, 225.0))
    quick = make_supervisor("quick", "a", planned_load=PlannedLoad({"a": 1.0}, 50.0))
    router = create_router(slow, quick)
    resume = threading.Event()
    for unit in (slow, quick):  # no request ends while others are submitted
        threading.Thread(target=unit.engine.call, args=(lambda _: resume.wait(WAIT),)).start()
    collectors = [Collector() for _ in range(8)]
    for number, collector in enumerate(collectors):
        router.submit(request(number, "a", 5, 20), collector)
    loads = dict(router.expected_load())
    resume.set()
    assert all(collector.done.wait(WAIT) for collector in collectors)
    assert loads == {"slow": 3 * 75.0, "quick": 5 * 25.0}
    assert dict(router.expected_load()) == {"slow": 0.0, "quick": 0.0}
    assert router.unit_names("a") == ["slow", "quick"]
    assert router.unit_names("b") == ["slow"]


def test_request_fails_after_too_many_unit_deaths(
    create_router: Callable[..., Router], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(routing, "MAX_MOVES", 2)
    router = create_router(make_supervisor("0", "a", 0, 0, 0))
    (first,) = ask(router, [request(1, "a", 5, 6)])
    assert isinstance(first.error, EngineDead)
    assert "given up after 2 units died" in str(first.error)
    (second,) = ask(router, [request(2, "a", 5, 6)])
    assert second.tokens == alone(request(2, "a", 5, 6))


def test_unit_that_dies_too_often_is_not_restarted(
    create_router: Callable[..., Router], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(unit_reviver, "MAX_DEATHS", 1)
    router = create_router(make_supervisor("0", "a", 0, 0, 0, 0), make_supervisor("1", "b"))
    (outcome,) = ask(router, [request(1, "a", 5, 6)])
    assert isinstance(outcome.error, EngineDead)
    assert "died 2 times" in str(router.failure("0"))
    with pytest.raises(EngineDead, match="died 2 times"):
        router.submit(request(2, "a", 5, 6), Collector())
    (other,) = ask(router, [request(3, "b", 5, 6)])
    assert other.tokens == alone(request(3, "b", 5, 6))


def test_cancelled_request_is_not_recovered(create_router: Callable[..., Router]):
    unit = make_supervisor("0", "a", 1)
    router = create_router(unit)
    blocked, resume = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        blocked.set()
        resume.wait(WAIT)

    threading.Thread(target=unit.engine.call, args=(hold,)).start()
    assert blocked.wait(WAIT)
    collectors = [Collector() for _ in range(3)]
    for number, collector in enumerate(collectors):
        router.submit(request(number, "a", 5, 20), collector)
    router.cancel(1)
    resume.set()
    assert all(collector.done.wait(WAIT) for collector in collectors)
    assert [collector.reason for collector in collectors] == ["length", "cancelled", "length"]


def test_close_ends_requests(create_router: Callable[..., Router]):
    unit = make_supervisor("0", "a")
    router = create_router(unit)
    collector = Collector()
    router.submit(request(1, "a", 5, 40), collector)
    router.close()
    assert collector.done.wait(WAIT)
    assert collector.reason == "length" or isinstance(collector.error, EngineDead)
    with pytest.raises(EngineDead, match="closed"):
        router.submit(request(2, "a", 5, 6), Collector())
    router.close()


def test_held_requests_wait_and_continue_in_order(create_router: Callable[..., Router]):
    router, notified = create_router(make_supervisor("0", "ab")), []
    router.on_held = notified.append
    router.hold("a")
    collectors = [Collector() for _ in range(4)]
    for number, collector in enumerate(collectors):
        router.submit(request(number, "a", 5, 6), collector)
    (other,) = ask(router, [request(9, "b", 5, 6)])
    assert other.tokens == alone(request(9, "b", 5, 6))
    assert notified == ["a"] * 4
    assert router.num_held("a") == 4
    router.cancel(2)
    assert collectors[2].reason == "cancelled"
    assert router.wait_drained("a", 0.0)
    router.release("a")
    for number in (0, 1, 3):
        assert collectors[number].done.wait(WAIT)
        assert collectors[number].tokens == alone(request(number, "a", 5, 6))
    assert router.num_held("a") == 0


def test_running_requests_are_withdrawn_and_resumed(create_router: Callable[..., Router]):
    unit = make_supervisor("0", "a")
    router = create_router(unit)
    collectors = [Collector() for _ in range(6)]
    for number, collector in enumerate(collectors):
        router.submit(request(number, "a", 5, 40), collector)
    router.hold("a")
    for _ in range(100):
        router.withdraw("a")
        if router.wait_drained("a", 0.01):
            break
    assert unit.engine.call(lambda scheduler: scheduler.num_requests) == 0
    waiting = router.num_held("a")
    assert waiting == sum(not collector.done.is_set() for collector in collectors)
    assert router.idle_seconds("a") == 0.0 or not waiting
    router.release("a")
    for number, collector in enumerate(collectors):
        assert collector.done.wait(WAIT)
        assert collector.tokens == alone(request(number, "a", 5, 40))
    assert dict(router.expected_load()) == {"0": 0.0}


def test_requests_of_a_dead_unit_are_held_with_their_model(create_router: Callable[..., Router]):
    unit = make_supervisor("0", "a", 1)
    router = create_router(unit)
    collectors = [Collector() for _ in range(2)]
    for number, collector in enumerate(collectors):
        router.submit(request(number, "a", 5, 20), collector)
    router.hold("a")
    assert router.wait_drained("a", WAIT)  # the dead unit's requests are held
    router.release("a")
    for number, collector in enumerate(collectors):
        assert collector.done.wait(WAIT)
        assert collector.tokens == alone(request(number, "a", 5, 20))


def test_refused_model_fails_held_and_new_requests(create_router: Callable[..., Router]):
    router = create_router(make_supervisor("0", "ab"))
    router.hold("a")
    waiting = Collector()
    router.submit(request(1, "a"), waiting)
    router.refuse("a", ModelUnavailable("it is broken"))
    assert isinstance(waiting.error, ModelUnavailable)
    with pytest.raises(ModelUnavailable, match="it is broken"):
        router.submit(request(2, "a"), Collector())
    router.release("a")
    (outcome,) = ask(router, [request(3, "a")])
    assert outcome.tokens == alone(request(3, "a"))
    with pytest.raises(UnknownModel, match="no model 'c'"):
        router.submit(request(4, "c"), Collector())


def test_idle_seconds_since_the_last_request():
    now = [10.0]
    router = Router([make_supervisor("0", "ab")], clock=lambda: now[0])
    now[0] = 15.0
    assert router.idle_seconds("a") == 5.0
    ask(router, [request(1, "a", 5, 6)])
    now[0] = 18.0
    for _ in range(1000):  # its end is noted after its last token
        if router.wait_drained("a", 1.0):
            break
    assert router.idle_seconds("a") == 3.0
    assert router.idle_seconds("b") == 8.0
    router.close()
