"""The models of a running fleet: their entries, units, states and locks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from muxjax.config.model_entry import ModelEntry
from muxjax.engine.health import ModelHealth, ModelStatus
from muxjax.errors import UnknownModel, WrongState
from muxjax.units.local_unit import LocalUnit


@dataclass
class ManagedModel:
    """One model of a fleet.

    Attributes:
      entry: its entry of the fleet file.
      units: that serve it; several for replicas on several units.
      status: sleeping <-> loading <-> loaded; failed if it could not be loaded or woken.
      error: reason of the failure.
      lock: held by the thread that changes the model.
    """

    entry: ModelEntry
    units: tuple[LocalUnit, ...]
    status: ModelStatus
    error: str | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def name(self) -> str:
        """Its name in the fleet."""
        return self.entry.name

    def require(self, status: ModelStatus, operation: str) -> None:
        """Checks its status.

        Raises:
          WrongState: it has another status; the message contains `operation`.
        """
        if self.status != status:
            reason = "" if self.error is None else f" ({self.error})"
            raise WrongState(f"{self.name} cannot be {operation}: it is {self.status}{reason}")


class ModelRegistry:
    """The models of a running fleet, by name. Safe to use from any thread.

    Args:
      units: of the fleet, with their models.
    """

    def __init__(self, units: Sequence[LocalUnit]) -> None:
        self._units = tuple(units)
        self._models: dict[str, ManagedModel] = {}
        for name in dict.fromkeys(name for unit in units for name in unit.models):
            model_units = tuple(unit for unit in units if name in unit.models)
            awake = all(unit.is_awake(name) for unit in model_units)
            entry = model_units[0].spec.model_specs[name].entry
            self._models[name] = ManagedModel(entry, model_units, "loaded" if awake else "sleeping")

    def models(self) -> list[ManagedModel]:
        """Returns all models."""
        return list(self._models.values())

    def get(self, name: str) -> ManagedModel | None:
        """Returns the model of this name, or None."""
        return self._models.get(name)

    def add(self, model: ManagedModel) -> None:
        """Adds a model of a new name."""
        self._models[model.name] = model

    def remove(self, name: str) -> None:
        """Removes a model."""
        del self._models[name]

    def entries(self) -> dict[str, ModelEntry]:
        """Returns the entry of every model, by name."""
        return {model.name: model.entry for model in self.models()}

    def states(self) -> dict[str, ModelHealth]:
        """Returns the state of every model, by name."""
        return {
            model.name: ModelHealth(model.status, model.error, model.entry.pinned)
            for model in self.models()
        }

    @contextmanager
    def locked(self, name: str) -> Iterator[ManagedModel]:
        """Holds the lock of a model, which serializes its changes.

        Raises:
          UnknownModel: there is no model of this name.
        """
        model = self._models.get(name)
        if model is None:
            known = ", ".join(self._models)
            raise UnknownModel(f"no model {name!r}; there are {known}", field="model")
        with model.lock:
            if self._models.get(name) is not model:
                raise UnknownModel(f"no model {name!r}: it was unloaded", field="model")
            yield model

    def unit_for(self, entry: ModelEntry, unit: str | None = None) -> LocalUnit:
        """Returns the unit for a model.

        Args:
          entry: of the model.
          unit: the unit's name; by default the unit that has the model, or else the unit with the
            fewest bytes of weights.

        Raises:
          WrongState: there is no such unit, or the model is on several units.
        """
        model = self._models.get(entry.name)
        if model is not None and unit is None:
            if len(model.units) > 1:
                raise WrongState(
                    f"{entry.name} is on several units of a plan: change the plan, and restart"
                )
            return model.units[0]
        candidates = [local for local in self._units if unit in (None, local.name)]
        if not candidates:
            known = ", ".join(local.name for local in self._units)
            raise WrongState(f"no unit {unit!r}; there are {known}")
        return min(candidates, key=lambda local: local.weight_bytes)
