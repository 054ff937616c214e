"""The policies by name: what picks the next step.

| policy | what it is | file |
|---|---|---|
| `slo` | prompts and tokens in the order that latency targets ask for | `slo.py` |
| `adbs` | MuxServe's adaptive batch scheduling | `adaptive_batch.py` |
| `fcfs`, `round_robin`, `static`, `temporal`, `mutex` | baselines | `baselines.py` |

`spatial`, separate devices for each model, is not a policy but a placement
(`placement/planner/spatial.py`).
"""

from __future__ import annotations

from muxjax.scheduling.policies.adbs import AdaptiveBatchScheduling
from muxjax.scheduling.policies.baselines import Fcfs, Mutex, RoundRobin, Static, Temporal
from muxjax.scheduling.policies.slo import SloPolicy
from muxjax.scheduling.scheduler import Policy

POLICIES: dict[str, type[Policy]] = {
    "slo": SloPolicy,
    "adbs": AdaptiveBatchScheduling,
    "fcfs": Fcfs,
    "round_robin": RoundRobin,
    "static": Static,
    "temporal": Temporal,
    "mutex": Mutex,
}


def make_policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
      ValueError: there is none.
    """
    if name == "spatial":
        raise ValueError(
            "spatial gives each model devices of its own: a placement, not a policy of one unit; "
            "`muxjax simulate --policy spatial` shows what it brings"
        )
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name]()
