"""The policies by name where programs run side by side. `temporal` and `mutex` never do that."""

from __future__ import annotations

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.placement.simulator.concurrent_policies import (
    ConcurrentAdaptiveBatch,
    ConcurrentFcfs,
    ConcurrentRoundRobin,
    ConcurrentStatic,
)
from muxjax.placement.simulator.concurrent_slo import ConcurrentSlo
from muxjax.scheduling.scheduler import Policy

CONCURRENT_POLICIES = {
    policy.name: policy
    for policy in (
        ConcurrentSlo,
        ConcurrentAdaptiveBatch,
        ConcurrentRoundRobin,
        ConcurrentFcfs,
        ConcurrentStatic,
    )
}


def make_concurrent_policy(name: str, compute: ComputeShares) -> Policy:
    """The policy of this name for programs that run side by side.

    Raises:
      ValueError: there is none.
    """
    if name not in CONCURRENT_POLICIES:
        raise ValueError(
            f"no policy {name!r} for programs side by side; there are "
            f"{', '.join(CONCURRENT_POLICIES)}"
        )
    return CONCURRENT_POLICIES[name](compute)
