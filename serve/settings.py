"""What a server is made with, besides its fleet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from muxjax.config.fleet_file import FleetConfig
from muxjax.config.server import ServerConfig
from muxjax.scheduling.specs import LatencySlo
from muxjax.serve.access.keys import Keys
from muxjax.serve.ops.tracing import Tracing


@dataclass(frozen=True)
class ServerSettings:
    """Limits, keys and targets of a server.

    Attributes:
      server: limits and time-outs.
      keys: who may call; none let everybody.
      slo: latency targets by model.
      local_only: it listens on a loopback address, so names of other machines do not mean it.
      tracing: where traces of calls go, if anywhere.
      fleet_file: what the fleet came from, and is brought to when it is read again.
    """

    server: ServerConfig = field(default_factory=ServerConfig)
    keys: Keys = field(default_factory=lambda: Keys(()))
    slo: Mapping[str, LatencySlo] = field(default_factory=dict)
    local_only: bool = False
    tracing: Tracing | None = None
    fleet_file: Path | None = None

    @classmethod
    def of(
        cls,
        config: FleetConfig,
        *,
        keys: Keys,
        local_only: bool,
        tracing: Tracing | None = None,
        fleet_file: Path | None = None,
    ) -> ServerSettings:
        """Those of a fleet file."""
        return cls(config.server, keys, slo_of(config), local_only, tracing, fleet_file)


def slo_of(config: FleetConfig) -> dict[str, LatencySlo]:
    """Latency targets by model."""
    return {model.name: model.slo.latency_slo for model in config.models}
