"""Server settings: limits, API keys, latency targets and tracing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from muxjax.config.fleet_file import FleetConfig
from muxjax.config.server import ServerConfig
from muxjax.scheduling.specs import LatencySlo
from muxjax.serve.access.keys import Keys
from muxjax.serve.tracing import Tracing


@dataclass(frozen=True)
class ServerSettings:
    """Limits, API keys and latency targets of a server.

    Attributes:
      server: limits and timeouts.
      keys: API keys; with none, every call is permitted.
      slo: latency targets by model.
      local_only: whether the server listens on a loopback address. Such a server without keys
        answers only to local host names.
      tracing: exports a span for each call; None for no tracing.
      fleet_file: the file that a reload applies; None if the fleet did not come from a file.
    """

    server: ServerConfig = field(default_factory=ServerConfig)
    keys: Keys = field(default_factory=lambda: Keys(()))
    slo: Mapping[str, LatencySlo] = field(default_factory=dict)
    local_only: bool = False
    tracing: Tracing | None = None
    fleet_file: Path | None = None

    @classmethod
    def from_config(
        cls,
        config: FleetConfig,
        *,
        keys: Keys,
        local_only: bool,
        tracing: Tracing | None = None,
        fleet_file: Path | None = None,
    ) -> ServerSettings:
        """Builds the settings from a fleet file."""
        return cls(config.server, keys, slo_by_model(config), local_only, tracing, fleet_file)


def slo_by_model(config: FleetConfig) -> dict[str, LatencySlo]:
    """Returns the latency targets of a fleet file by model."""
    return {model.name: model.slo.latency_slo for model in config.models}
