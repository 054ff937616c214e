"""The router over units on mock executors: which unit gets a request, and what a death changes."""

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
from muxjax.scheduling.scheduler import Scheduler
from tests.muxjax.engine.harness import WAIT, Collector
from tests.muxjax.engine.router_harness import PAGES, SPECS, Dying, alone, ask, requests_of
from tests.muxjax.scheduling.harness import request


def make_supervisor(
    name: str, models: str, *deaths: int, seconds: dict[str, float] | None = None
) -> UnitSupervisor:
    """A unit whose engines die at these steps, one engine after the other."""
    specs, left = [SPECS[model] for model in models], list(deaths)

    def start() -> Engine:
        unit = Scheduler(specs, PAGES, create_policy("adbs"))
        return Engine(unit, Dying(specs, PAGES, left))

    return UnitSupervisor(name, models, start, seconds)


@pytest.fixture
def routed():
    """Creates routers, and closes them after the test."""
    made: list[Router] = []

    def make(*units: UnitSupervisor) -> Router:
        made.append(Router(units))
        return made[-1]

    yield make
    for router in made:
        router.close()


@pytest.mark.parametrize("deaths", [(0,), (3,), (2, 4), (1, 0, 5)])
def test_a_death_loses_no_request_and_changes_no_token(routed: Callable[..., Router], deaths):
    unit = make_supervisor("0", "ab", *deaths)
    requests = requests_of("ab", 10)
    for one, collector in zip(requests, ask(routed(unit), requests), strict=True):
        assert collector.error is None
        assert collector.tokens == alone(one)
        assert collector.reason == "length"
    assert unit.restarts == len(deaths)


def test_requests_of_a_dead_unit_go_on_in_its_replica(routed: Callable[..., Router]):
    dies, lives = make_supervisor("dies", "a", 3), make_supervisor("lives", "ab")
    requests = requests_of("a", 12)
    for one, collector in zip(requests, ask(routed(dies, lives), requests), strict=True):
        assert collector.tokens == alone(one)


def test_the_unit_with_the_least_expected_wait_is_chosen(routed: Callable[..., Router]):
    slow = make_supervisor("slow", "ab", seconds={"a": 3.0, "b": 3.0})
    quick = make_supervisor("quick", "a", seconds={"a": 1.0})
    router = routed(slow, quick)
    held = threading.Event()
    for unit in (slow, quick):  # nothing ends while requests are handed out
        threading.Thread(target=unit.engine.call, args=(lambda _: held.wait(WAIT),)).start()
    collectors = [Collector() for _ in range(8)]
    for number, collector in enumerate(collectors):
        router.submit(request(number, "a", 5, 20), collector)
    waits = dict(router.expected_load())
    held.set()
    assert all(collector.done.wait(WAIT) for collector in collectors)
    assert waits == {"slow": 2 * 75.0, "quick": 6 * 25.0}
    assert dict(router.expected_load()) == {"slow": 0.0, "quick": 0.0}
    assert router.unit_names("a") == ["slow", "quick"]
    assert router.unit_names("b") == ["slow"]


def test_a_request_that_was_on_many_dying_units_is_ended(
    routed: Callable[..., Router], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(routing, "MAX_MOVES", 2)
    router = routed(make_supervisor("0", "a", 0, 0, 0))
    (first,) = ask(router, [request(1, "a", 5, 6)])
    assert isinstance(first.error, EngineDead)
    assert "given up after 2 units died" in str(first.error)
    (second,) = ask(router, [request(2, "a", 5, 6)])
    assert second.tokens == alone(request(2, "a", 5, 6))


def test_a_unit_that_keeps_dying_is_given_up(
    routed: Callable[..., Router], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(unit_reviver, "MAX_DEATHS", 1)
    router = routed(make_supervisor("0", "a", 0, 0, 0, 0), make_supervisor("1", "b"))
    (found,) = ask(router, [request(1, "a", 5, 6)])
    assert isinstance(found.error, EngineDead)
    assert "died 2 times" in str(router.failure("0"))
    with pytest.raises(EngineDead, match="died 2 times"):
        router.submit(request(2, "a", 5, 6), Collector())
    (other,) = ask(router, [request(3, "b", 5, 6)])
    assert other.tokens == alone(request(3, "b", 5, 6))


def test_a_request_that_is_not_wanted_is_not_carried_on(routed: Callable[..., Router]):
    unit = make_supervisor("0", "a", 1)
    router = routed(unit)
    holds, held = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        holds.set()
        held.wait(WAIT)

    threading.Thread(target=unit.engine.call, args=(hold,)).start()
    assert holds.wait(WAIT)
    collectors = [Collector() for _ in range(3)]
    for number, collector in enumerate(collectors):
        router.submit(request(number, "a", 5, 20), collector)
    router.cancel(1)
    held.set()
    assert all(collector.done.wait(WAIT) for collector in collectors)
    assert [collector.reason for collector in collectors] == ["length", "cancelled", "length"]


def test_closing_ends_requests(routed: Callable[..., Router]):
    unit = make_supervisor("0", "a")
    router = routed(unit)
    collector = Collector()
    router.submit(request(1, "a", 5, 40), collector)
    router.close()
    assert collector.done.wait(WAIT)
    assert collector.reason == "length" or isinstance(collector.error, EngineDead)
    with pytest.raises(EngineDead, match="closed"):
        router.submit(request(2, "a", 5, 6), Collector())
    router.close()


def test_held_requests_wait_and_go_on_in_order(routed: Callable[..., Router]):
    router, told = routed(make_supervisor("0", "ab")), []
    router.on_held = told.append
    router.hold("a")
    collectors = [Collector() for _ in range(4)]
    for number, collector in enumerate(collectors):
        router.submit(request(number, "a", 5, 6), collector)
    (other,) = ask(router, [request(9, "b", 5, 6)])
    assert other.tokens == alone(request(9, "b", 5, 6))
    assert told == ["a"] * 4
    assert router.num_held("a") == 4
    router.cancel(2)
    assert collectors[2].reason == "cancelled"
    assert router.wait_drained("a", 0.0)
    router.release("a")
    for number in (0, 1, 3):
        assert collectors[number].done.wait(WAIT)
        assert collectors[number].tokens == alone(request(number, "a", 5, 6))
    assert router.num_held("a") == 0


def test_what_runs_is_taken_back_and_goes_on(routed: Callable[..., Router]):
    unit = make_supervisor("0", "a")
    router = routed(unit)
    collectors = [Collector() for _ in range(6)]
    for number, collector in enumerate(collectors):
        router.submit(request(number, "a", 5, 40), collector)
    router.hold("a")
    for _ in range(100):
        router.withdraw("a")
        if router.wait_drained("a", 0.01):
            break
    assert unit.engine.call(lambda inner: inner.num_requests) == 0
    waiting = router.num_held("a")
    assert waiting == sum(not collector.done.is_set() for collector in collectors)
    assert router.idle_seconds("a") == 0.0 or not waiting
    router.release("a")
    for number, collector in enumerate(collectors):
        assert collector.done.wait(WAIT)
        assert collector.tokens == alone(request(number, "a", 5, 40))
    assert dict(router.expected_load()) == {"0": 0.0}


def test_a_unit_that_dies_while_its_model_is_held(routed: Callable[..., Router]):
    unit = make_supervisor("0", "a", 1)
    router = routed(unit)
    collectors = [Collector() for _ in range(2)]
    for number, collector in enumerate(collectors):
        router.submit(request(number, "a", 5, 20), collector)
    router.hold("a")
    assert router.wait_drained("a", WAIT)  # those of the dead unit wait here
    router.release("a")
    for number, collector in enumerate(collectors):
        assert collector.done.wait(WAIT)
        assert collector.tokens == alone(request(number, "a", 5, 20))


def test_a_model_that_is_refused(routed: Callable[..., Router]):
    router = routed(make_supervisor("0", "ab"))
    router.hold("a")
    waiting = Collector()
    router.submit(request(1, "a"), waiting)
    router.refuse("a", ModelUnavailable("it is broken"))
    assert isinstance(waiting.error, ModelUnavailable)
    with pytest.raises(ModelUnavailable, match="it is broken"):
        router.submit(request(2, "a"), Collector())
    router.release("a")
    (found,) = ask(router, [request(3, "a")])
    assert found.tokens == alone(request(3, "a"))
    with pytest.raises(UnknownModel, match="no model 'c'"):
        router.submit(request(4, "c"), Collector())


def test_how_long_a_model_was_idle():
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
