"""Changes to a running fleet: sleep, wake, load, unload and reload."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from muxjax.config.fleet_file import FleetConfig, ModelEntry, load_fleet_config, load_model_entry
from muxjax.engine.health import ModelHealth
from muxjax.engine.router import Router
from muxjax.errors import MuxError, UnknownModel
from muxjax.units import reload as reloading
from muxjax.units.local_unit import LocalUnit
from muxjax.units.registry import ModelRegistry
from muxjax.units.sleep_wake import SleepController

log = logging.getLogger("muxjax")

IDLE_LOOK_SECONDS = 1.0
"""Between two looks at which models are idle."""


class FleetAdmin:
    """Changes the models of a fleet while it serves. From any thread; what takes time blocks.

    Args:
      units: of the fleet.
      router: of the fleet.
      config: the fleet file.
      changed: called when there are other models than before.
    """

    def __init__(
        self,
        units: Sequence[LocalUnit],
        router: Router,
        config: FleetConfig,
        *,
        changed: Callable[[], None],
    ) -> None:
        self.lifecycle = SleepController(units, router, idle_timeout=config.idle_timeout)
        self._units = tuple(units)
        self._config = config
        self._membership = ModelRegistry(units, self.lifecycle, changed)
        self._reloading = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="muxjax-idle", daemon=True)
        self._thread.start()

    def states(self) -> dict[str, ModelHealth]:
        """Of every model, by name."""
        return self.lifecycle.states()

    def sleep(self, model: str) -> None:
        """See `SleepController.sleep`."""
        self.lifecycle.sleep(model)

    def wake(self, model: str) -> None:
        """See `SleepController.wake`."""
        self.lifecycle.wake(model)

    def load(self, entry: ModelEntry | Mapping[str, Any] | str, unit: str | None = None) -> None:
        """Adds a model to a unit; see `ModelRegistry.load`.

        Args:
          entry: as in a fleet file; or the name of a model that the fleet's file has, and that was
            unloaded or has failed. One that sleeps is woken.
          unit: the unit's name; by default that with the least weights.

        Raises:
          UnknownModel: the fleet's file has no model of this name.
          MuxError: see `ModelRegistry.load`.
        """
        if isinstance(entry, str):
            state = self.states().get(entry)
            if state is not None and state.status == "sleeping":
                self.wake(entry)
                return
            entry = self._known(entry)
        elif not isinstance(entry, ModelEntry):
            entry = load_model_entry(entry)
        self._membership.load(entry, unit)

    def unload(self, model: str) -> None:
        """See `ModelRegistry.unload`."""
        self._membership.unload(model)

    def reload(
        self, source: FleetConfig | Mapping[str, Any] | str | os.PathLike[str]
    ) -> dict[str, Any]:
        """Brings the fleet to what a fleet file says, without dropping a request.

        Args:
          source: path of the file, or the same as a dict.

        Returns:
          `added`, `removed`, `replaced`, `changed`: names of models; `failed`: for each model that
          is not as the file says, why.

        Raises:
          FleetConfigError: the file is not valid, or needs a restart; nothing was done.
          MuxError: a new model cannot be had; nothing was done.
        """
        config = load_fleet_config(source)
        with self._reloading:
            entries = self._membership.entries()
            changes = reloading.differences(self._config, entries, config)
            failed = reloading.apply(changes, config, self._units, self._membership)
            self._config = config
            self.lifecycle.idle_timeout = config.idle_timeout
        return {
            "added": list(changes.added),
            "removed": list(changes.removed),
            "replaced": list(changes.replaced),
            "changed": list(changes.changed),
            "failed": failed,
        }

    def close(self) -> None:
        """Ends looking for idle models."""
        self._stop.set()

    def _known(self, name: str) -> ModelEntry:
        entries = {entry.name: entry for entry in self._config.models} | self._membership.entries()
        if name not in entries:
            raise UnknownModel(
                f"no model {name!r} in the fleet file: load it with a whole entry", field="model"
            )
        return entries[name]

    def _look(self) -> None:
        while not self._stop.wait(IDLE_LOOK_SECONDS):
            try:
                self.lifecycle.look()
            except MuxError:
                log.exception("looking for idle models failed")
