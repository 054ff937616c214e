"""Changes to a running fleet: sleep, wake, load, unload and reload.

No request is dropped: while a model sleeps, wakes or is replaced, its requests wait in the router.
Operations on one model are serialized; operations on different models may overlap.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from muxjax.config.fleet_file import FleetConfig, load_fleet_config, load_model_entry
from muxjax.config.model_entry import ModelEntry
from muxjax.engine.health import ModelHealth
from muxjax.engine.router import Router
from muxjax.errors import MuxError, UnknownModel, WrongState
from muxjax.units.local_unit import LocalUnit
from muxjax.units.model_loader import ModelLoader
from muxjax.units.registry import ModelRegistry
from muxjax.units.reload import FleetChanges, check_changes, diff_fleet
from muxjax.units.sleep_wake import SleepController
from muxjax.units.unit_spec import ModelBuildSpec

log = logging.getLogger("muxjax")

IDLE_CHECK_SECONDS = 1.0
"""Interval between two checks for idle models, in seconds."""


class FleetAdmin:
    """Changes the models of a fleet while it serves.

    Safe to use from any thread. Operations that take time block.

    Args:
      units: of the fleet.
      router: of the fleet.
      config: the fleet file.
      on_change: called when models were added, removed, replaced or changed.

    Attributes:
      idle_timeout: idle seconds after which a model without a timeout is put to sleep; None: never.
    """

    def __init__(
        self,
        units: Sequence[LocalUnit],
        router: Router,
        config: FleetConfig,
        *,
        on_change: Callable[[], None],
    ) -> None:
        self.idle_timeout = config.idle_timeout
        self._units = tuple(units)
        self._router = router
        self._config = config
        self._on_change = on_change
        self._registry = ModelRegistry(units)
        self._controller = SleepController(self._registry, router)
        self._loader = ModelLoader(self._registry, self._controller, router, on_change=on_change)
        self._reloading = threading.Lock()
        self._waking: set[str] = set()
        self._waking_lock = threading.Lock()
        for model in self._registry.models():
            if model.status == "sleeping":
                router.hold(model.name)
        router.on_held = self._wake_for_request
        self._stop = threading.Event()
        threading.Thread(target=self._watch_idle, name="muxjax-idle", daemon=True).start()

    @property
    def drain_seconds(self) -> float:
        """Seconds that running requests have to end before they are withdrawn; may be set."""
        return self._controller.drain_seconds

    @drain_seconds.setter
    def drain_seconds(self, seconds: float) -> None:
        self._controller.drain_seconds = seconds

    def states(self) -> dict[str, ModelHealth]:
        """Returns the state of every model, by name."""
        return self._registry.states()

    def close(self) -> None:
        """Stops the checks for idle models."""
        self._stop.set()

    # Sleep and wake

    def sleep(self, model: str) -> None:
        """Puts a model to sleep; does nothing if it sleeps already.

        Its running requests have `drain_seconds` to end. Requests that still run then are
        withdrawn; they keep their emitted tokens and wake the model again.

        Raises:
          UnknownModel: there is no model of this name.
          WrongState: it is pinned, or has failed.
          RuntimeError: the host has no room for its weights; the model stays awake.
        """
        with self._registry.locked(model) as managed:
            if managed.status == "sleeping":
                return
            managed.require("loaded", "put to sleep")
            if managed.entry.pinned:
                raise WrongState(f"{model} is pinned: it never sleeps")
            self._controller.put_to_sleep(managed)

    def wake(self, model: str) -> None:
        """Wakes a model; does nothing if it is awake. A model that was never loaded is loaded.

        Raises:
          UnknownModel: there is no model of this name.
          WrongState: it has failed; `load` tries again.
          ModelUnavailable: it cannot be woken; its status is now failed.
        """
        with self._registry.locked(model) as managed:
            if managed.status == "loaded":
                return
            managed.require("sleeping", "woken")
            self._controller.bring_up(managed)

    def sleep_idle(self) -> list[str]:
        """Puts the models to sleep that were idle longer than their timeout.

        Returns:
          Their names.
        """
        slept = []
        for managed in self._registry.models():
            timeout = managed.entry.idle_timeout or self.idle_timeout
            if timeout is None or managed.status != "loaded" or managed.entry.pinned:
                continue
            if self._router.idle_seconds(managed.name) < timeout:
                continue
            try:
                self.sleep(managed.name)
                slept.append(managed.name)
            except (MuxError, RuntimeError, TimeoutError):
                log.exception("%s cannot be put to sleep", managed.name)
        return slept

    def _watch_idle(self) -> None:
        while not self._stop.wait(IDLE_CHECK_SECONDS):
            try:
                self.sleep_idle()
            except MuxError:
                log.exception("the check for idle models failed")

    def _wake_for_request(self, name: str) -> None:
        """Wakes a sleeping model in another thread; called for each request that is held."""
        managed = self._registry.get(name)
        if managed is None or managed.status != "sleeping":
            return
        with self._waking_lock:
            if name in self._waking:
                return
            self._waking.add(name)

        def wake() -> None:
            try:
                self.wake(name)
            except MuxError as error:
                log.debug("%s was not woken: %s", name, error)  # `bring_up` has logged the reason
            finally:
                with self._waking_lock:
                    self._waking.discard(name)

        threading.Thread(target=wake, name=f"muxjax-wake-{name}", daemon=True).start()

    # Load and unload

    def load(self, entry: ModelEntry | Mapping[str, Any] | str, unit: str | None = None) -> None:
        """Adds a model to a unit: reads its weights and compiles its programs.

        Its requests are accepted once its checkpoint is checked, and wait until it is loaded.

        Args:
          entry: as in a fleet file; or the name of a model of the fleet file that was unloaded or
            has failed. A sleeping model is woken.
          unit: name of the unit; by default the unit with the fewest bytes of weights.

        Raises:
          UnknownModel: the fleet file has no model of this name.
          WrongState: a model of this name exists and has not failed, or there is no such unit.
          CheckpointError, DownloadError, FleetConfigError, PoolTooSmall: its checkpoint cannot be
            opened, or the unit cannot hold it; nothing has changed.
          ModelUnavailable: loading it failed; its status is failed.
        """
        if isinstance(entry, str):
            state = self.states().get(entry)
            if state is not None and state.status == "sleeping":
                self.wake(entry)
                return
            entry = self._lookup_entry(entry)
        elif not isinstance(entry, ModelEntry):
            entry = load_model_entry(entry)
        self._loader.load(entry, unit)

    def unload(self, model: str) -> None:
        """Removes a model and frees its memory.

        Its running requests have `drain_seconds` to end. Requests that still run then, and new
        requests, end with `ModelUnavailable`.

        Raises:
          UnknownModel: there is no model of this name.
          WrongState: it is the last model of its unit.
        """
        self._loader.unload(model)

    def _lookup_entry(self, name: str) -> ModelEntry:
        entries = {entry.name: entry for entry in self._config.models} | self._registry.entries()
        if name not in entries:
            raise UnknownModel(
                f"no model {name!r} in the fleet file: load it with a complete entry",
                field="model",
            )
        return entries[name]

    # Reload

    def reload(
        self, source: FleetConfig | Mapping[str, Any] | str | os.PathLike[str]
    ) -> dict[str, Any]:
        """Applies a fleet file to the running fleet, without dropping a request.

        The complete file is checked first. Then models are removed, changed, replaced and added, in
        this order.

        Args:
          source: path of the file, or its content as a dict.

        Returns:
          `added`, `removed`, `replaced`, `changed`: names of models; `failed`: by model, the reason
          why a change was not made.

        Raises:
          FleetConfigError: the file is not valid, or needs a restart; nothing was changed.
          MuxError: a new model cannot be loaded; nothing was changed.
        """
        config = load_fleet_config(source)
        with self._reloading:
            changes = diff_fleet(self._config, self._registry.entries(), config)
            wanted = {entry.name: entry for entry in config.models}
            replacements = check_changes(changes, wanted, self._units)
            failed = self._apply(changes, wanted, replacements)
            self._config = config
            self.idle_timeout = config.idle_timeout
        return {
            "added": list(changes.added),
            "removed": list(changes.removed),
            "replaced": list(changes.replaced),
            "changed": list(changes.changed),
            "failed": failed,
        }

    def _apply(
        self,
        changes: FleetChanges,
        wanted: Mapping[str, ModelEntry],
        replacements: Mapping[str, ModelBuildSpec],
    ) -> dict[str, str]:
        """Applies checked changes, and returns the reason for each model that failed."""
        failed: dict[str, str] = {}

        def attempt(operation: Callable[[], None], *names: str) -> None:
            try:
                operation()
            except MuxError as error:
                failed.update(dict.fromkeys(names, str(error)))

        def add_all() -> None:
            for name in changes.added:
                attempt(partial(self.load, wanted[name]), name)

        # A unit always has a model: if all present models are removed, new models are added first.
        all_removed = not set(self._registry.entries()) - set(changes.removed)
        if all_removed:
            add_all()
        for name in changes.removed:
            attempt(partial(self.unload, name), name)
        if changes.changed:
            entries = {name: wanted[name] for name in changes.changed}
            attempt(partial(self._update_entries, entries), *changes.changed)
        for name in changes.replaced:
            attempt(partial(self._loader.replace, replacements[name]), name)
        if not all_removed:
            add_all()
        return failed

    def _update_entries(self, entries: Mapping[str, ModelEntry]) -> None:
        """Changes the expected load, floor, SLO, pin and timeout of models.

        Raises:
          PoolTooSmall: the floors leave no room for a request of some model.
        """
        for unit in self._units:
            unit.update_expectations(
                [
                    spec.update_expectations(entries[name])
                    for name, spec in unit.spec.model_specs.items()
                    if name in entries
                ]
            )
        for name, entry in entries.items():
            managed = self._registry.get(name)
            assert managed is not None, "a changed model is in the registry"
            managed.entry = entry
            if entry.pinned and managed.status == "sleeping":
                self.wake(name)
        self._on_change()
