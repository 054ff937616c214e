"""Registers the concurrent variants of policies; `temporal` and `mutex` have none."""

from __future__ import annotations

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.placement.simulator.concurrent_policies import (
    ConcurrentAdaptiveBatch,
    ConcurrentFcfs,
    ConcurrentRoundRobin,
    ConcurrentStatic,
)
from muxjax.placement.simulator.concurrent_slo import ConcurrentSlo
from muxjax.scheduling.kv_cache.pool_division import OpenPool
from muxjax.scheduling.policies.interface import Policy
from muxjax.scheduling.policies.registry import (
    ConcurrentVariant,
    get_policy,
    policy_names,
    register_concurrent_variant,
)


def create_concurrent_policy(name: str, compute: ComputeShares) -> Policy:
    """Creates the concurrent variant of a policy.

    Raises:
      ValueError: the policy has no concurrent variant.
    """
    variant = get_policy(name).concurrent
    if variant is None:
        known = [other for other in policy_names() if get_policy(other).concurrent is not None]
        raise ValueError(
            f"the policy {name!r} has no concurrent variant; available: {', '.join(known)}"
        )
    return variant.factory(compute)


for _name, _variant in {
    "slo": ConcurrentVariant(ConcurrentSlo, exclusive_shares=True),
    "adbs": ConcurrentVariant(ConcurrentAdaptiveBatch),
    "fcfs": ConcurrentVariant(ConcurrentFcfs, OpenPool),
    "round_robin": ConcurrentVariant(ConcurrentRoundRobin, OpenPool),
    "static": ConcurrentVariant(ConcurrentStatic, exclusive_shares=True),
}.items():
    register_concurrent_variant(_name, _variant)
