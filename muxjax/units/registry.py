"""Adds, drops and replaces models of a running fleet, without dropping a request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from muxjax.config.fleet_file import ModelEntry
from muxjax.errors import FleetConfigError, ModelUnavailable, MuxError, WrongState
from muxjax.units import build as loading
from muxjax.units.local_unit import LocalUnit
from muxjax.units.sleep_wake import ManagedModel, SleepController, make_ready
from muxjax.units.unit_spec import ModelBuildSpec

log = logging.getLogger("muxjax")


class ModelRegistry:
    """Who belongs to a fleet. From any thread; what takes time blocks.

    Args:
      units: where models may be.
      lifecycle: what becomes of them.
      changed: called when there are other models than before, or others of the same name.
    """

    def __init__(
        self, units: Sequence[LocalUnit], lifecycle: SleepController, changed: Callable[[], None]
    ) -> None:
        self._units = tuple(units)
        self._lifecycle = lifecycle
        self._router = lifecycle.router
        self._changed = changed
        self._adding = threading.RLock()

    def entries(self) -> dict[str, ModelEntry]:
        """What a fleet file would say of every model, by name."""
        return {name: life.entry for name, life in list(self._lifecycle.lives.items())}

    def unit_for(self, entry: ModelEntry, name: str | None = None) -> LocalUnit:
        """The unit of that name; by default where the model is, or where weights are fewest.

        Raises:
          WrongState: there is no such unit, or the model is on several.
        """
        life = self._lifecycle.lives.get(entry.name)
        if life is not None and name is None:
            if len(life.units) > 1:
                raise WrongState(
                    f"{entry.name} is on several units, as planned: plan again, and restart"
                )
            return life.units[0]
        units = [unit for unit in self._units if name in (None, unit.name)]
        if not units:
            known = ", ".join(unit.name for unit in self._units)
            raise WrongState(f"no unit {name!r}; there are {known}")
        return min(units, key=lambda unit: unit.weight_bytes)

    def load(self, entry: ModelEntry, unit: str | None = None) -> None:
        """Adds a model to a unit: its weights are read and its programs compiled.

        Requests for it wait from the moment when its checkpoint is known to be sound.

        Args:
          entry: what a fleet file would say of it.
          unit: the unit's name; by default that with the least weights.

        Raises:
          WrongState: there is one of this name, and it has not failed; or there is no such unit.
          CheckpointError, DownloadError, FleetConfigError, PoolTooSmall: it cannot be had, or the
            unit cannot take it; nothing has changed.
          ModelUnavailable: loading it failed; it is listed as failed.
        """
        name, lives = entry.name, self._lifecycle.lives
        with self._adding:
            known = lives.get(name)
            if known is not None and known.status != "failed":
                raise WrongState(f"{name} is {known.status} already")
            where = self.unit_for(entry, unit)
            part = loading.spec_added_model(where.plan, entry)
            if known is not None:
                self.replace(part)
                return
            _try_out(where, part)
            life = ManagedModel(entry, (where,), "sleeping" if entry.sleeping else "loading")
            life.lock.acquire()
            self._router.hold(name)
            where.register(part, loading.programs_of(part, where.plan.kv))
            lives[name] = life
        try:
            self._changed()
            if life.status == "loading":
                self._lifecycle.bring_up(life)
        finally:
            life.lock.release()

    def unload(self, name: str) -> None:
        """Drops a model, and frees all that it takes.

        Its running requests have the drain time to end; the rest, and what comes meanwhile, ends
        with `ModelUnavailable`.

        Raises:
          UnknownModel: there is none of this name.
          WrongState: it is its unit's last.
        """
        with self._lifecycle.changing(name) as life:
            last = [unit.name for unit in life.units if len(unit.plan.parts) == 1]
            if last:
                raise WrongState(f"{name} is the last of unit {last[0]}: let it sleep instead")
            gone = ModelUnavailable(f"{name} is being unloaded")
            self._router.refuse(name, gone)
            try:
                self._lifecycle.quiesce(life, hold=False)
            except ModelUnavailable:
                self._router.release(name)
                raise
            self._router.refuse(name, gone)
            del self._lifecycle.lives[name]
            for unit in life.units:
                unit.retire(name)
                unit.forget(name).free()
            self._changed()
            self._router.forget_model(name)
        log.info("%s is unloaded", name)

    def replace(self, part: ModelBuildSpec) -> None:
        """Loads another model in the place of the one of its name, which serves until it is ready.

        Args:
          part: from `loading.plan_added` on the model's unit.

        Raises:
          UnknownModel: there is none of this name.
          WrongState: it is on several units.
          ModelUnavailable: the new one cannot be loaded; the old one goes on.
        """
        name = part.model.name
        with self._lifecycle.changing(name) as life:
            unit = self.unit_for(part.entry)
            before, old = unit.plan.parts[name], unit.programs[name]
            programs = loading.programs_of(part, unit.plan.kv)
            if life.status == "loaded":
                try:
                    make_ready(part, programs)
                except (MuxError, RuntimeError) as error:
                    raise ModelUnavailable(f"{name} cannot be replaced: {error}") from error
            self._lifecycle.quiesce(life)
            unit.retire(name)
            unit.register(part, programs)
            if life.status == "loaded":
                try:
                    unit.admit(name)
                except (MuxError, ValueError) as error:
                    unit.register(before, old)
                    programs.free()
                    unit.admit(name)
                    self._router.release(name)
                    raise ModelUnavailable(f"{name} cannot be replaced: {error}") from error
            old.free()
            life.entry = part.entry
            self._changed()
            if life.status == "loaded":
                self._router.release(name)
            elif life.status == "failed":
                self._lifecycle.bring_up(life)
        self._lifecycle.wake_if_asked(name)
        log.info("%s is replaced", name)

    def expect(self, entries: Mapping[str, ModelEntry]) -> None:
        """Takes other expectations, floors, targets, pins and time-outs of models.

        Raises:
          PoolTooSmall: the floors leave no room for a request of some model.
        """
        lives = self._lifecycle.lives
        for unit in self._units:
            unit.expect(
                [
                    unit.plan.parts[name].expecting(entry)
                    for name, entry in entries.items()
                    if name in unit.plan.parts
                ]
            )
        for name, entry in entries.items():
            lives[name].entry = entry
            if entry.pinned and lives[name].status == "sleeping":
                self._lifecycle.wake(name)
        self._changed()


def _try_out(unit: LocalUnit, part: ModelBuildSpec) -> None:
    try:
        unit.try_out(part)
    except ValueError as error:
        raise FleetConfigError(
            f"{error}: list it in the fleet file, with `sleeping: true` if need be, and restart"
        ) from error
