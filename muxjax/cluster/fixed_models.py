"""What a fleet file may not say of models that stay where they are put."""

from __future__ import annotations

from muxjax.config.fleet_file import FleetConfig
from muxjax.errors import FleetConfigError


def check_fixed(config: FleetConfig) -> None:
    """Refuses models that would sleep in other processes, where nothing puts them to sleep.

    Raises:
      FleetConfigError: a model begins asleep, or sleeps when idle.
    """
    found = ["idle_timeout"] if config.idle_timeout is not None else []
    for entry in config.models:
        found += [f"sleeping (of {entry.name})"] if entry.sleeping else []
        found += [f"idle_timeout (of {entry.name})"] if entry.idle_timeout is not None else []
    if found:
        raise FleetConfigError(
            f"with --ray or --coordinator models do not sleep: remove {', '.join(found)}"
        )
