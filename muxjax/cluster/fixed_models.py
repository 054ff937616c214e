"""Checks a fleet file for a cluster, where models cannot sleep."""

from __future__ import annotations

from muxjax.config.fleet_file import FleetConfig
from muxjax.errors import FleetConfigError


def check_models_stay_awake(config: FleetConfig) -> None:
    """Checks that no model of a fleet sleeps, which units in other processes do not support.

    Raises:
      FleetConfigError: a model starts asleep or sleeps when idle; the message names the keys.
    """
    keys = ["idle_timeout"] if config.idle_timeout is not None else []
    for entry in config.models:
        keys += [f"sleeping (of {entry.name})"] if entry.sleeping else []
        keys += [f"idle_timeout (of {entry.name})"] if entry.idle_timeout is not None else []
    if keys:
        raise FleetConfigError(
            f"with --ray or --coordinator models cannot sleep: remove {', '.join(keys)}"
        )
