"""`slo` side by side: a model that comes later has a pace of its own."""

from __future__ import annotations

from muxjax.scheduling.compute_shares import ComputeShares
from muxjax.scheduling.concurrent_slo import ConcurrentSlo
from muxjax.scheduling.quotas import OpenPool
from muxjax.scheduling.unit import Unit
from tests.muxjax.scheduling.harness import request, spec
from tests.muxjax.scheduling.test_concurrent_policies import finish, kind, started

SHARES = {("a", "prefill"): 0.8, ("a", "decode"): 0.3, ("b", "prefill"): 0.8, ("b", "decode"): 0.3}


def test_a_model_that_comes_later_is_paced() -> None:
    policy = ConcurrentSlo(ComputeShares(SHARES))
    found = Unit([spec("a")], 200, policy, kv_quotas=OpenPool, side_by_side=True)
    found.add(request(0, "a", max_tokens=20))
    (prefill,) = started(found)
    found.add_model(spec("b"))
    found.add(request(1, "b", max_tokens=20))
    assert started(found) == []  # one prefill at a time
    finish(found, prefill)
    done = set()
    for _ in range(10):
        for step in started(found, now=60.0):
            done.add(kind(step))
            finish(found, step, now=60.0)
    assert {("a", "decode"), ("b", "prefill"), ("b", "decode")} <= done
