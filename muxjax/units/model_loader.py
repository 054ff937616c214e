"""Loads models into the units of a running fleet, replaces them and unloads them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from muxjax.config.model_entry import ModelEntry
from muxjax.engine.router import Router
from muxjax.errors import FleetConfigError, ModelUnavailable, MuxError, WrongState
from muxjax.units.build import build_model_programs, load_model_programs
from muxjax.units.build_unit_spec import build_added_model_spec
from muxjax.units.local_unit import LocalUnit
from muxjax.units.registry import ManagedModel, ModelRegistry
from muxjax.units.sleep_wake import SleepController
from muxjax.units.unit_spec import ModelBuildSpec

log = logging.getLogger("muxjax")


class ModelLoader:
    """Adds, replaces and removes the models of a fleet. Safe to use from any thread.

    Args:
      registry: of the fleet.
      controller: drains and wakes models.
      router: of the fleet; holds the requests of models that change.
      on_change: called when a model was added, removed or replaced.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        controller: SleepController,
        router: Router,
        *,
        on_change: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._controller = controller
        self._router = router
        self._on_change = on_change
        self._adding = threading.RLock()

    def load(self, entry: ModelEntry, unit: str | None) -> None:
        """Adds a model to a unit, or replaces a failed model; see `FleetAdmin.load`."""
        with self._adding:
            known = self._registry.get(entry.name)
            if known is not None and known.status != "failed":
                raise WrongState(f"{entry.name} is {known.status} already")
            local_unit = self._registry.unit_for(entry, unit)
            spec = build_added_model_spec(local_unit.spec, entry)
            if known is not None:
                self.replace(spec)
                return
            managed = self._add(local_unit, spec)
        try:
            self._on_change()
            if managed.status == "loading":
                self._controller.bring_up(managed)
        finally:
            managed.lock.release()

    def unload(self, model: str) -> None:
        """Removes a model and frees its memory; see `FleetAdmin.unload`."""
        with self._registry.locked(model) as managed:
            last = [unit.name for unit in managed.units if len(unit.spec.model_specs) == 1]
            if last:
                raise WrongState(
                    f"{model} is the last model of unit {last[0]}: put it to sleep instead"
                )
            error = ModelUnavailable(f"{model} is being unloaded")
            self._router.refuse(model, error)
            try:
                self._controller.drain(managed, hold=False)
            except ModelUnavailable:
                self._router.release(model)
                raise
            self._router.refuse(model, error)
            self._registry.remove(model)
            for unit in managed.units:
                unit.deactivate(model)
                unit.unregister(model).free()
            self._on_change()
            self._router.forget_model(model)
        log.info("%s is unloaded", model)

    def replace(self, spec: ModelBuildSpec) -> None:
        """Replaces a model with a new one of the same name, which is loaded first.

        Args:
          spec: from `build_added_model_spec` on the model's unit.

        Raises:
          UnknownModel: there is no model of this name.
          WrongState: it is on several units.
          ModelUnavailable: the new model cannot be loaded; the old one is still served.
        """
        name = spec.model.name
        with self._registry.locked(name) as managed:
            unit = self._registry.unit_for(spec.entry)
            old_spec, old_programs = unit.spec.model_specs[name], unit.programs[name]
            programs = build_model_programs(spec, unit.spec.kv)
            if managed.status == "loaded":
                try:
                    load_model_programs(spec, programs)
                except (MuxError, RuntimeError) as error:
                    raise ModelUnavailable(f"{name} cannot be replaced: {error}") from error
            self._controller.drain(managed)
            unit.deactivate(name)
            unit.register(spec, programs)
            if managed.status == "loaded":
                try:
                    unit.activate(name)
                except (MuxError, ValueError) as error:
                    unit.register(old_spec, old_programs)
                    programs.free()
                    unit.activate(name)
                    self._router.release(name)
                    raise ModelUnavailable(f"{name} cannot be replaced: {error}") from error
            old_programs.free()
            managed.entry = spec.entry
            self._on_change()
            if managed.status == "loaded":
                self._router.release(name)
            elif managed.status == "failed":
                self._controller.bring_up(managed)
            self._controller.wake_if_requested(managed)
        log.info("%s is replaced", name)

    def _add(self, unit: LocalUnit, spec: ModelBuildSpec) -> ManagedModel:
        """Adds a model to the registry and to a unit, and returns it locked."""
        try:
            unit.check_fits(spec)
        except ValueError as error:
            raise FleetConfigError(
                f"{error}: add it to the fleet file, with `sleeping: true` if needed, and restart"
            ) from error
        managed = ManagedModel(
            spec.entry, (unit,), "sleeping" if spec.entry.sleeping else "loading"
        )
        managed.lock.acquire()
        self._router.hold(managed.name)
        unit.register(spec, build_model_programs(spec, unit.spec.kv))
        self._registry.add(managed)
        return managed
