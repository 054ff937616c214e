"""Moves models between awake and asleep while other models are served.

A sleeping model has no pages and no slots, and its weights are in host memory (`weight_offload`).
Its programs stay compiled. Its requests wait in the router, and the first one wakes it. Slow work
runs in the caller's thread; the engine only adds or removes the model, between two steps.
"""

from __future__ import annotations

import logging
import time

from muxjax.engine.router import Router
from muxjax.errors import InsufficientMemory, ModelUnavailable, MuxError
from muxjax.units.build import load_model_programs
from muxjax.units.local_unit import LocalUnit
from muxjax.units.memory_check import check_model_fits
from muxjax.units.registry import ManagedModel, ModelRegistry

log = logging.getLogger("muxjax")

DRAIN_SECONDS = 30.0
"""Time that running requests have to end before their model sleeps or is unloaded."""
_WITHDRAW_TRIES = 100
"""Maximum number of attempts to withdraw the requests of a model."""
_WITHDRAW_SECONDS = 0.05
"""Time to wait after each try for the last step to end."""


class SleepController:
    """Puts models to sleep, and loads or wakes them.

    The caller holds the model's lock (`ModelRegistry.locked`).

    Args:
      registry: of the fleet.
      router: holds the requests of models that are not loaded.

    Attributes:
      drain_seconds: time after which running requests are withdrawn; may be set.
    """

    def __init__(self, registry: ModelRegistry, router: Router) -> None:
        self.drain_seconds = DRAIN_SECONDS
        self._registry = registry
        self._router = router

    def put_to_sleep(self, model: ManagedModel) -> None:
        """Drains a loaded model and offloads its weights.

        Requests that still run after `drain_seconds` are withdrawn with their emitted tokens and
        wait in the router. Waiting requests then wake the model.

        Raises:
          ModelUnavailable, RuntimeError: it cannot be drained, or the host has no room for its
            weights; the model stays loaded.
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
        """Calls the router's `on_held` if requests wait for a sleeping model."""
        if model.status == "sleeping" and self._router.num_held(model.name):
            self._router.on_held(model.name)

    def drain(self, model: ManagedModel, *, hold: bool = True) -> None:
        """Waits until no unit has a request of a model; withdraws requests that run too long.

        Args:
          model: its requests are held in the router afterwards.
          hold: hold new requests from the start; if False, hold them only while withdrawing.

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
          ModelUnavailable: it cannot be loaded; its status is now failed, and its memory is freed.
        """
        name, began = model.name, time.perf_counter()
        model.status = "loading"
        try:
            for unit in model.units:
                self._load_weights(model, unit)
                unit.activate(name)
        except Exception as error:
            reason = str(error) or type(error).__name__
            # An error of the model's files needs no traceback.
            unexpected = not isinstance(error, MuxError)
            log.error("%s cannot be loaded: %s", name, reason, exc_info=unexpected)
            self._fail(model, reason)
            raise ModelUnavailable(f"{name} cannot be loaded: {reason}") from error
        model.status, model.error = "loaded", None
        log.info("%s is awake after %.2f s", name, time.perf_counter() - began)
        self._router.release(name)

    def _load_weights(self, model: ManagedModel, unit: LocalUnit) -> None:
        """Loads or restores weights; puts idle models to sleep while device memory is too small."""
        programs, spec = unit.programs[model.name], unit.spec.model_specs[model.name]
        # On a CPU the weights of a sleeping model stay where they are.
        on_host = spec.mesh.devices[0].platform == "cpu"
        while True:
            try:
                if programs.ready:
                    check_model_fits(spec, weights=not on_host)
                    programs.restore()
                else:
                    load_model_programs(spec, programs)
                return
            except InsufficientMemory:
                if on_host or not self._sleep_longest_idle(model):
                    raise
            except RuntimeError as error:  # includes JaxRuntimeError
                if "RESOURCE_EXHAUSTED" not in str(error) or not self._sleep_longest_idle(model):
                    raise

    def _sleep_longest_idle(self, model: ManagedModel) -> bool:
        """Puts the longest-idle model of the same units to sleep.

        Returns:
          Whether there was an idle model.
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
            # Skip a locked model: its thread may wait for this thread.
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
