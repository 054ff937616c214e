"""Moves models between awake and asleep while other models are served.

A sleeping model has no pages and no slots, and its weights are in host memory (`weight_offload`);
its programs stay compiled. Its requests wait in the router, and the first of them wakes it. Slow
work runs in the caller's thread; the engine only adds or removes the model, between two steps.
"""

from __future__ import annotations

import logging
import time

from muxjax.engine.router import Router
from muxjax.errors import ModelUnavailable
from muxjax.units.build import load_model_programs
from muxjax.units.local_unit import LocalUnit
from muxjax.units.registry import ManagedModel, ModelRegistry

log = logging.getLogger("muxjax")

DRAIN_SECONDS = 30.0
"""Time for the running requests of a model that is put to sleep or unloaded."""
_WITHDRAW_TRIES = 100
_WITHDRAW_SECONDS = 0.05
"""Time to wait after each try for the last step to end."""


class SleepController:
    """The transitions of models. The caller holds the model's lock (`ModelRegistry.locked`).

    Args:
      registry: of the fleet.
      router: holds the requests of models that are not loaded.

    Attributes:
      drain_seconds: time for running requests to end before they are withdrawn; may be changed.
    """

    def __init__(self, registry: ModelRegistry, router: Router) -> None:
        self.drain_seconds = DRAIN_SECONDS
        self._registry = registry
        self._router = router

    def put_to_sleep(self, model: ManagedModel) -> None:
        """Drains a loaded model and offloads its weights.

        Requests that still run after `drain_seconds` are withdrawn, with the tokens they have
        emitted, and wait in the router. Requests that wait then wake the model.

        Raises:
          ModelUnavailable, RuntimeError: it cannot be drained, or the host has no room for its
            weights; the model is loaded, as before.
        """
        name, began = model.name, time.perf_counter()
        try:
            self.drain(model)
            for unit in model.units:
                unit.deactivate(name)
                unit.programs[name].offload()
        except BaseException:
            for unit in model.units:
                unit.programs[name].restore()
                unit.activate(name)
            self._router.release(name)
            raise
        model.status = "sleeping"
        log.info("%s sleeps after %.2f s", name, time.perf_counter() - began)
        self.wake_if_requested(model)

    def wake_if_requested(self, model: ManagedModel) -> None:
        """Tells the router's `on_held` if requests wait for a sleeping model."""
        if model.status == "sleeping" and self._router.num_held(model.name):
            self._router.on_held(model.name)

    def drain(self, model: ManagedModel, *, hold: bool = True) -> None:
        """Waits until no unit has a request of a model; withdraws those that run too long.

        Args:
          model: its requests are held in the router afterwards.
          hold: hold new requests from the start; False holds them only when requests are withdrawn.

        Raises:
          ModelUnavailable: a unit does not release a withdrawn request.
        """
        name = model.name
        if hold:
            self._router.hold(name)
        if self._router.wait_drained(name, self.drain_seconds):
            return
        self._router.hold(name)
        for _ in range(_WITHDRAW_TRIES):
            self._router.withdraw(name)
            if self._router.wait_drained(name, _WITHDRAW_SECONDS):
                return
        raise ModelUnavailable(f"a unit does not release the requests of {name}")

    def bring_up(self, model: ManagedModel) -> None:
        """Loads or wakes a model, and releases its requests.

        Raises:
          ModelUnavailable: it cannot be loaded; its status is now failed, and it has no memory.
        """
        name, began = model.name, time.perf_counter()
        model.status = "loading"
        try:
            for unit in model.units:
                self._load_weights(model, unit)
                unit.activate(name)
        except Exception as error:
            reason = str(error) or type(error).__name__
            log.exception("%s cannot be loaded: %s", name, reason)
            self._fail(model, reason)
            raise ModelUnavailable(f"{name} cannot be loaded: {reason}") from error
        model.status, model.error = "loaded", None
        log.info("%s is awake after %.2f s", name, time.perf_counter() - began)
        self._router.release(name)

    def _load_weights(self, model: ManagedModel, unit: LocalUnit) -> None:
        """Brings weights to the devices; puts idle models to sleep while there is no room."""
        programs, spec = unit.programs[model.name], unit.spec.model_specs[model.name]
        while True:
            try:
                if programs.ready:
                    programs.restore()
                else:
                    load_model_programs(spec, programs)
                return
            except RuntimeError as error:  # JaxRuntimeError is one
                if "RESOURCE_EXHAUSTED" not in str(error) or not self._make_room(model):
                    raise

    def _make_room(self, model: ManagedModel) -> bool:
        """Puts the model that was idle longest on the same units to sleep.

        Returns:
          Whether there was one.
        """
        idle_seconds = {
            other.name: self._router.idle_seconds(other.name)
            for other in self._registry.models()
            if other is not model
            and other.status == "loaded"
            and not other.entry.pinned
            and set(other.units) & set(model.units)
        }
        for name in sorted(idle_seconds, key=lambda other: -idle_seconds[other]):
            other = self._registry.get(name)
            # A locked model is skipped: the thread that changes it may wait for this one.
            if other is None or not idle_seconds[name] or not other.lock.acquire(blocking=False):
                continue
            try:
                if other.status == "loaded":
                    self.put_to_sleep(other)
            finally:
                other.lock.release()
            log.info("%s was put to sleep to make room for %s", name, model.name)
            return True
        return False

    def _fail(self, model: ManagedModel, reason: str) -> None:
        model.status, model.error = "failed", reason
        for unit in model.units:
            unit.deactivate(model.name)
            unit.programs[model.name].free()
        error = ModelUnavailable(f"{model.name} could not be loaded: {reason}")
        self._router.refuse(model.name, error)
