"""The scheduling policies by name: the one list that the fleet file, commands and simulator read.

Another package adds a policy with `register_policy`. It declares a function without arguments that
calls it in the entry-point group `muxjax.policies`:

    [project.entry-points."muxjax.policies"]
    lifo = "my_package.policies:register"

An entry point that fails is logged as a warning and skipped.

`spatial`, separate devices for each model, is a placement and not a policy
(`placement/planner/spatial.py`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points

from muxjax.scheduling.kv_cache.pool_division import FixedPool, OpenPool
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.policies.adbs import AdaptiveBatchScheduling
from muxjax.scheduling.policies.baselines import Fcfs, Mutex, RoundRobin, Static, Temporal
from muxjax.scheduling.policies.interface import Policy
from muxjax.scheduling.policies.slo import SloPolicy

ENTRY_POINTS = "muxjax.policies"
"""Entry-point group of functions that register policies of other packages."""

log = logging.getLogger("muxjax")


@dataclass(frozen=True, slots=True)
class ConcurrentVariant:
    """A policy for programs that run concurrently, which only the simulator has.

    Attributes:
      factory: creates the policy from `placement.simulator.compute_shares.ComputeShares`.
      kv_quotas: division of the pool; None: as for programs that run one at a time.
      exclusive_shares: each model gets a separate part of the chip, instead of the plan's shares.
    """

    factory: Callable[..., Policy]
    kv_quotas: type[KVQuotas] | None = None
    exclusive_shares: bool = False


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """A policy in the registry.

    Attributes:
      name: name in the fleet file.
      factory: creates the policy; called once for each scheduler.
      description: one line for help texts.
      kv_quotas: division of the pool among the models.
      concurrent: variant for programs that run concurrently; None: the simulator runs one program
        at a time.
    """

    name: str
    factory: Callable[[], Policy]
    description: str
    kv_quotas: type[KVQuotas] = KVQuotas
    concurrent: ConcurrentVariant | None = None


_ENTRIES: dict[str, PolicyEntry] = {}


def register_policy(
    name: str,
    factory: Callable[[], Policy],
    *,
    description: str,
    kv_quotas: type[KVQuotas] = KVQuotas,
) -> None:
    """Adds a policy.

    Args:
      name: name in the fleet file.
      factory: creates the policy; for example, the policy class.
      description: one line for help texts.
      kv_quotas: division of the pool among the models.

    Raises:
      ValueError: the name is taken.
    """
    if name in _ENTRIES or name == "spatial":
        raise ValueError(f"there is a policy {name!r} already")
    _ENTRIES[name] = PolicyEntry(name, factory, description, kv_quotas)


def register_concurrent_variant(name: str, variant: ConcurrentVariant) -> None:
    """Adds the variant of a registered policy for programs that run concurrently.

    Raises:
      ValueError: there is no policy of this name, or it has a variant already.
    """
    entry = get_policy(name)
    if entry.concurrent is not None:
        raise ValueError(f"the policy {name!r} has a concurrent variant already")
    _ENTRIES[name] = replace(entry, concurrent=variant)


def policy_names() -> tuple[str, ...]:
    """Names of all policies, in the order in which they were registered."""
    _load_entry_points()
    return tuple(_ENTRIES)


def get_policy(name: str) -> PolicyEntry:
    """Returns the policy of this name.

    Raises:
      ValueError: there is none. The message includes the entry points that failed.
    """
    failures = () if name in _ENTRIES else _load_entry_points()
    if name == "spatial":
        raise ValueError(
            "spatial gives each model its own devices: a placement, not a policy of one unit; "
            "`muxjax simulate --policy spatial` simulates it"
        )
    if name not in _ENTRIES:
        reasons = "; ".join((f"there are {', '.join(_ENTRIES)}", *failures))
        raise ValueError(f"no policy {name!r}; {reasons}")
    return _ENTRIES[name]


def create_policy(name: str) -> Policy:
    """Creates a policy of this name.

    Raises:
      ValueError: there is none.
    """
    return get_policy(name).factory()


@functools.cache
def _load_entry_points() -> tuple[str, ...]:
    """Registers the policies of other packages; returns a message for each that failed."""
    failures: list[str] = []
    for entry_point in entry_points(group=ENTRY_POINTS):
        try:
            entry_point.load()()
        except Exception as error:  # noqa: BLE001 (other policies must stay usable)
            failures.append(
                f"entry point '{entry_point.name} = {entry_point.value}' of {ENTRY_POINTS} failed: "
                f"{type(error).__name__}: {error}"
            )
            log.warning("%s", failures[-1])
    return tuple(failures)


register_policy("slo", SloPolicy, description="by latency targets")
register_policy("adbs", AdaptiveBatchScheduling, description="MuxServe's adaptive batch scheduling")
register_policy("fcfs", Fcfs, description="one queue for all models")
register_policy("round_robin", RoundRobin, description="models in turn")
register_policy("static", Static, description="fixed shares of time and pool", kv_quotas=FixedPool)
register_policy(
    "temporal", Temporal, description="fcfs on a pool that is not divided", kv_quotas=OpenPool
)
register_policy(
    "mutex", Mutex, description="independent models behind one lock", kv_quotas=FixedPool
)
