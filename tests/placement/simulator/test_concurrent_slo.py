"""The concurrent variant of `slo`."""

from __future__ import annotations

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.placement.simulator.concurrent_slo import ConcurrentSlo
from muxjax.scheduling.kv_cache.pool_division import OpenPool
from muxjax.scheduling.scheduler import Scheduler
from tests.muxjax.scheduling.harness import request, spec
from tests.placement.simulator.harness import finish, kind, started

SHARES = {("a", "prefill"): 0.6, ("a", "decode"): 0.6, ("b", "prefill"): 0.4, ("b", "decode"): 0.4}


def test_a_model_that_is_added_later_is_tracked() -> None:
    policy = ConcurrentSlo(ComputeShares(SHARES))
    found = Scheduler([spec("a")], 200, policy, kv_quotas=OpenPool, concurrent=True)
    found.add(request(0, "a", max_tokens=20))
    (prefill,) = started(found)
    found.add_model(spec("b"))
    found.add(request(1, "b", max_tokens=20))
    (beside,) = started(found)
    assert kind(beside) == ("b", "prefill")
    finish(found, prefill)
    finish(found, beside)
    assert [kind(step) for step in started(found)] == [("a", "decode"), ("b", "decode")]


def test_prompts_wait_for_decodes_of_their_own_model_only() -> None:
    policy = ConcurrentSlo(ComputeShares(SHARES))
    found = Scheduler([spec("a"), spec("b")], 200, policy, kv_quotas=OpenPool, concurrent=True)
    found.add(request(0, "a", max_tokens=20))
    (prefill,) = started(found)
    finish(found, prefill)
    found.add(request(1, "b", max_tokens=20))
    steps = started(found)
    assert [kind(step) for step in steps] == [("b", "prefill"), ("a", "decode")]
    assert started(found) == []  # nothing of a model beside its own step


def test_a_model_without_others_gets_the_chip_until_its_step_ends() -> None:
    compute = ComputeShares(SHARES)
    found = Scheduler(
        [spec("a"), spec("b")], 200, ConcurrentSlo(compute), kv_quotas=OpenPool, concurrent=True
    )
    found.add(request(0, "a", max_tokens=20))
    (first,) = started(found)
    assert compute.allocated(("a", "prefill")) == 1.0
    found.add(request(1, "b", max_tokens=20))
    (beside,) = started(found)  # at once, though its part is lent
    assert compute.allocated(("b", "prefill")) == 0.4
    finish(found, first)
    (decode,) = started(found)
    assert kind(decode) == ("a", "decode")
    assert compute.allocated(("a", "decode")) == 0.6  # and no more than its own beside b
    finish(found, beside)
