from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from muxjax.scheduling.kv_cache.pool_division import FixedPool, OpenPool
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.policies import registry
from muxjax.scheduling.policies.baselines import RoundRobin
from muxjax.scheduling.policies.interface import Policy
from muxjax.scheduling.policies.registry import (
    ConcurrentVariant,
    create_policy,
    get_policy,
    policy_names,
    register_concurrent_variant,
    register_policy,
)
from muxjax.scheduling.scheduler import Scheduler
from muxjax.testing.mock_executor import MockExecutor, MockLatency
from tests.muxjax.scheduling.harness import Loop, isolated_tokens, request, spec


def test_policies_have_the_names_of_the_fleet_file() -> None:
    names = ("slo", "adbs", "fcfs", "round_robin", "static", "temporal", "mutex")
    assert policy_names() == names
    for name in policy_names():
        policy = create_policy(name)
        assert isinstance(policy, Policy)
        assert policy.name == name
    with pytest.raises(ValueError, match="no policy 'lifo'; there are slo, adbs, fcfs"):
        create_policy("lifo")
    with pytest.raises(ValueError, match="spatial gives each model its own devices"):
        create_policy("spatial")


def test_pool_division_of_each_policy() -> None:
    assert get_policy("slo").kv_quotas is get_policy("adbs").kv_quotas is KVQuotas
    assert get_policy("static").kv_quotas is get_policy("mutex").kv_quotas is FixedPool
    assert get_policy("temporal").kv_quotas is OpenPool
    assert all(get_policy(name).description for name in policy_names())


class InOrder(RoundRobin):
    name = "in_order"


@pytest.fixture
def isolated_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discards the policies that a test registers."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


@pytest.mark.usefixtures("isolated_registry")
def test_a_policy_can_be_registered() -> None:
    register_policy("in_order", InOrder, description="models in turn", kv_quotas=OpenPool)
    assert policy_names()[-1] == "in_order"
    loop = Loop.create([spec("a"), spec("b")], 200, "in_order", kv_quotas=OpenPool)
    loop.scheduler.add(request(0, "b"))
    loop.run()
    loop.assert_empty()
    assert loop.scheduler.stats()["policy"] == "in_order"
    for name in ("in_order", "adbs", "spatial"):
        with pytest.raises(ValueError, match=f"there is a policy '{name}' already"):
            register_policy(name, InOrder, description="models in turn")


@pytest.mark.usefixtures("isolated_registry")
def test_a_concurrent_variant_is_registered_once() -> None:
    register_policy("in_order", InOrder, description="models in turn")
    variant = ConcurrentVariant(lambda compute: InOrder())
    register_concurrent_variant("in_order", variant)
    assert get_policy("in_order").concurrent is variant
    with pytest.raises(ValueError, match="'in_order' has a concurrent variant already"):
        register_concurrent_variant("in_order", variant)


@dataclass(frozen=True)
class FakeEntryPoint:
    """An entry point whose `load` raises `error`, or returns `function`."""

    function: Callable[[], None]
    name: str = "in_order"
    value: str = "other_package.policies:register"
    error: Exception | None = None

    def load(self) -> Callable[[], None]:
        if self.error is not None:
            raise self.error
        return self.function


@pytest.fixture
def install_entry_points(
    isolated_registry: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., list[str]]]:
    """Function that replaces the installed entry points; returns the groups that were queried."""

    def install(*installed: FakeEntryPoint) -> list[str]:
        groups: list[str] = []

        def entry_points(group: str) -> list[FakeEntryPoint]:
            groups.append(group)
            return list(installed)

        monkeypatch.setattr(registry, "entry_points", entry_points)
        registry._load_entry_points.cache_clear()
        return groups

    yield install
    registry._load_entry_points.cache_clear()


def register_in_order() -> None:
    register_policy("in_order", InOrder, description="models in turn")


def test_entry_points_register_policies_of_other_packages(
    install_entry_points: Callable[..., list[str]],
) -> None:
    groups = install_entry_points(FakeEntryPoint(register_in_order))
    assert isinstance(create_policy("in_order"), InOrder)
    assert "in_order" in policy_names()
    assert groups == ["muxjax.policies"]


def raise_value_error() -> None:
    raise ValueError("there is a policy 'slo' already")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (
            FakeEntryPoint(
                register_in_order, "lifo", "lifo_policy:register", ImportError("no module 'torch'")
            ),
            "ImportError: no module 'torch'",
        ),
        (
            FakeEntryPoint(raise_value_error, "lifo", "lifo_policy:register"),
            "ValueError: there is a policy 'slo' already",
        ),
    ],
    ids=["import", "register"],
)
def test_failing_entry_point_is_named_and_other_policies_work(
    broken: FakeEntryPoint,
    reason: str,
    install_entry_points: Callable[..., list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    built_in = tuple(registry._ENTRIES)
    install_entry_points(broken, FakeEntryPoint(register_in_order))
    failure = f"entry point 'lifo = lifo_policy:register' of muxjax.policies failed: {reason}"
    assert policy_names() == (*built_in, "in_order")
    assert [record.getMessage() for record in caplog.records] == [failure]
    assert isinstance(create_policy("in_order"), InOrder)
    with pytest.raises(ValueError, match="no policy 'lifo'; there are slo, adbs") as error:
        create_policy("lifo")
    assert str(error.value).endswith(f"; {failure}")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("policy", policy_names())
def test_idle_unit_has_no_step(policy: str) -> None:
    loop = Loop.create([spec("a"), spec("b")], 200, policy)
    assert loop.scheduler.next_step(0.0) is None


@pytest.mark.parametrize(
    ("policy", "max_turns"),
    # `static` keeps fixed shares of the time, whatever the duration of other steps.
    [("slo", 12), ("adbs", 12), ("round_robin", 12), ("static", 40), ("mutex", 12)],
)
def test_a_greedy_neighbor_does_not_delay_others(policy: str, max_turns: int) -> None:
    specs = [
        spec("greedy", 2, 4, 64, max_seqs=8, decode_tokens=4),
        spec("modest", 3, 4, 64, max_seqs=8, decode_tokens=4),
    ]
    loop = Loop.create(specs, 3 + 8 * 32, policy)
    for i in range(100):
        loop.scheduler.add(request(i, "greedy", prompt_tokens=30, max_tokens=30))
    for _ in range(50):
        loop.turn()
    for i in range(10):
        modest = request(1000 + i, "modest", prompt_tokens=30, max_tokens=9)
        loop.scheduler.add(modest)
        turns = 0
        while not modest.output:
            loop.turn()
            turns += 1
            assert turns <= max_turns
        while not modest.finished:
            loop.turn()
            turns += 1
            assert turns <= max_turns + 30
        assert modest.output == isolated_tokens(loop.scheduler, modest)
    assert loop.scheduler.models["greedy"].waiting


@pytest.mark.parametrize("policy", policy_names())
def test_steps_may_have_zero_duration(policy: str) -> None:
    specs = [spec("a"), spec("b", 3)]
    still = MockLatency(prefill=0.0, prefill_token=0.0, decode=0.0, decode_sequence=0.0)
    scheduler = Scheduler(specs, 200, create_policy(policy), record_freed=True)
    loop = Loop(scheduler, MockExecutor(specs, 200, latency=still))
    for i in range(8):
        scheduler.add(request(i, "ab"[i % 2], max_tokens=20))
    loop.run()
    loop.assert_empty()
