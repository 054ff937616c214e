"""Puts models to sleep and wakes them while others are served.

    sleeping <-> loading <-> loaded        failed: it could not be loaded or woken

A model that sleeps has no pages and no slots, and its weights lie in the host's memory
(`parking.py`); its programs stay compiled. Its requests wait in the router, and the first of them
wakes it. All that takes time is done in the caller's thread, or in one made for it; the engine's
loop only switches, between two steps.

Operations on one model come one after the other; those on unlike models run side by side.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from muxjax.config.fleet_file import ModelEntry
from muxjax.engine.health import ModelHealth, ModelStatus
from muxjax.engine.router import Router
from muxjax.errors import ModelUnavailable, MuxError, UnknownModel, WrongState
from muxjax.executor.programs import ModelPrograms
from muxjax.units import build as loading
from muxjax.units.local_unit import LocalUnit
from muxjax.units.unit_spec import ModelBuildSpec

log = logging.getLogger("muxjax")

DRAIN_SECONDS = 30.0
"""For the running requests of a model that is put to sleep or unloaded."""
_TAKE_BACK_TRIES = 100


@dataclass
class ManagedModel:
    """One model of a fleet; `lock` is held by whoever changes it."""

    entry: ModelEntry
    units: tuple[LocalUnit, ...]
    status: ModelStatus
    error: str | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def name(self) -> str:
        return self.entry.name


class SleepController:
    """The models of a running fleet. From any thread; what takes time blocks.

    Args:
      units: where they are.
      router: holds their requests.
      idle_timeout: seconds after which models sleep that say nothing else; None: they do not.
      drain_seconds: for running requests to end by themselves.

    Attributes:
      lives: all models, by name.
      router: as given.
      idle_timeout, drain_seconds: as given; may be changed.
    """

    def __init__(
        self,
        units: Sequence[LocalUnit],
        router: Router,
        *,
        idle_timeout: float | None = None,
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        self.router = router
        self.idle_timeout = idle_timeout
        self.lives: dict[str, ManagedModel] = {}
        self.drain_seconds = drain_seconds
        self._waking: set[str] = set()
        self._waking_lock = threading.Lock()
        for name in dict.fromkeys(name for unit in units for name in unit.models):
            where = tuple(unit for unit in units if name in unit.models)
            awake = all(unit.is_awake(name) for unit in where)
            entry = where[0].plan.parts[name].entry
            self.lives[name] = ManagedModel(entry, where, "loaded" if awake else "sleeping")
            if not awake:
                router.hold(name)
        router.on_held = self._wake_for_request

    def states(self) -> dict[str, ModelHealth]:
        """Of every model, by name."""
        return {
            name: ModelHealth(life.status, life.error, life.entry.pinned)
            for name, life in list(self.lives.items())
        }

    def sleep(self, name: str) -> None:
        """Puts a model to sleep; nothing if it sleeps already.

        Its running requests have `drain_seconds` to end; what runs still is put back in line, with
        what it has emitted. Requests that come meanwhile wait, and then wake it.

        Raises:
          UnknownModel: there is none of this name.
          WrongState: it is pinned, or has failed.
          RuntimeError: the host has no room for its weights; it is awake as before.
        """
        with self.changing(name) as life:
            if life.status == "sleeping":
                return
            _must_be(life, "loaded", "put to sleep")
            if life.entry.pinned:
                raise WrongState(f"{name} is pinned: it never sleeps")
            began = time.perf_counter()
            try:
                self.quiesce(life)
                for unit in life.units:
                    unit.retire(name)
                    unit.programs[name].sleep()
            except BaseException:
                for unit in life.units:
                    unit.programs[name].wake()
                    unit.admit(name)
                self.router.release(name)
                raise
            life.status = "sleeping"
        log.info("%s sleeps; it took %.2f s", name, time.perf_counter() - began)
        self.wake_if_asked(name)

    def wake(self, name: str) -> None:
        """Wakes a model that sleeps; nothing if it is awake. One that was never loaded is loaded.

        Raises:
          UnknownModel: there is none of this name.
          WrongState: it has failed; `Membership.load` tries again.
          ModelUnavailable: it cannot be woken; it has failed now.
        """
        with self.changing(name) as life:
            if life.status == "loaded":
                return
            _must_be(life, "sleeping", "woken")
            self.bring_up(life)

    def look(self) -> list[str]:
        """Puts models to sleep that have been idle for too long; gives their names."""
        slept = []
        for name, life in list(self.lives.items()):
            limit = life.entry.idle_timeout or self.idle_timeout
            if limit is None or life.status != "loaded" or life.entry.pinned:
                continue
            if self.router.idle_seconds(name) < limit:
                continue
            try:
                self.sleep(name)
                slept.append(name)
            except (MuxError, RuntimeError, TimeoutError):
                log.exception("%s cannot be put to sleep", name)
        return slept

    # What `Membership` is made of as well

    @contextmanager
    def changing(self, name: str) -> Iterator[ManagedModel]:
        """A model that nobody else changes meanwhile.

        Raises:
          UnknownModel: there is none of this name.
        """
        life = self.lives.get(name)
        if life is None:
            known = ", ".join(self.lives)
            raise UnknownModel(f"no model {name!r}; there are {known}", field="model")
        with life.lock:
            if self.lives.get(name) is not life:
                raise UnknownModel(f"no model {name!r}: it was unloaded", field="model")
            yield life

    def quiesce(self, life: ManagedModel, *, hold: bool = True) -> None:
        """Waits until no unit has a request of a model, and holds what comes (if `hold`)."""
        if hold:
            self.router.hold(life.name)
        if self.router.wait_drained(life.name, self.drain_seconds):
            return
        self.router.hold(life.name)
        for _ in range(_TAKE_BACK_TRIES):
            self.router.withdraw(life.name)
            if self.router.wait_drained(life.name, 0.05):
                return
        raise ModelUnavailable(f"the requests of {life.name} do not leave their unit")

    def bring_up(self, life: ManagedModel) -> None:
        """From sleep, or from nothing, to loaded; its requests go on.

        Raises:
          ModelUnavailable: it cannot be; it has failed now, and takes no memory.
        """
        name, began = life.name, time.perf_counter()
        life.status = "loading"
        try:
            for unit in life.units:
                self._ready_on(life, unit)
                unit.admit(name)
        except Exception as error:
            reason = str(error) or type(error).__name__
            log.exception("%s cannot be loaded: %s", name, reason)
            self._fail(life, reason)
            raise ModelUnavailable(f"{name} cannot be loaded: {life.error}") from error
        life.status, life.error = "loaded", None
        log.info("%s is awake; it took %.2f s", name, time.perf_counter() - began)
        self.router.release(name)

    def wake_if_asked(self, name: str) -> None:
        """Wakes a model that sleeps, in another thread, if requests wait for it."""
        if self.router.num_held(name):
            self._wake_for_request(name)

    # Parts

    def _ready_on(self, life: ManagedModel, unit: LocalUnit) -> None:
        """Brings weights to the devices; puts idle models to sleep as long as there is no room."""
        programs, part = unit.programs[life.name], unit.plan.parts[life.name]
        while True:
            try:
                if programs.ready:
                    programs.wake()
                else:
                    make_ready(part, programs)
                return
            except RuntimeError as error:  # JAX's errors are RuntimeErrors
                if "RESOURCE_EXHAUSTED" not in str(error) or not self._make_room(life):
                    raise

    def _make_room(self, life: ManagedModel) -> bool:
        """Puts that model to sleep which was idle longest on the same units; False if none is."""
        idle = {
            other.name: self.router.idle_seconds(other.name)
            for other in list(self.lives.values())
            if other is not life
            and other.status == "loaded"
            and not other.entry.pinned
            and set(other.units) & set(life.units)
        }
        for name in sorted(idle, key=lambda other: -idle[other]):
            other = self.lives.get(name)
            # One that is being changed is passed over: its changer may wait for this one.
            if other is None or idle[name] == 0 or not other.lock.acquire(blocking=False):
                continue
            try:
                self.sleep(name)
            finally:
                other.lock.release()
            log.info("%s was put to sleep to make room for %s", name, life.name)
            return True
        return False

    def _fail(self, life: ManagedModel, reason: str) -> None:
        life.status, life.error = "failed", reason
        for unit in life.units:
            unit.retire(life.name)
            unit.programs[life.name].free()
        error = ModelUnavailable(f"{life.name} could not be loaded: {reason}")
        self.router.refuse(life.name, error)

    def _wake_for_request(self, name: str) -> None:
        life = self.lives.get(name)
        if life is None or life.status != "sleeping":
            return
        with self._waking_lock:
            if name in self._waking:
                return
            self._waking.add(name)

        def wake() -> None:
            try:
                self.wake(name)
            except MuxError as error:
                log.debug("%s was not woken: %s", name, error)  # `bring_up` has told why
            finally:
                with self._waking_lock:
                    self._waking.discard(name)

        threading.Thread(target=wake, name=f"muxjax-wake-{name}", daemon=True).start()


def make_ready(part: ModelBuildSpec, programs: ModelPrograms) -> None:
    """Reads a model's weights and compiles its programs; if that fails, nothing of them is left."""
    name = part.model.name
    try:
        loading.load_and_compile(
            {name: part},
            {name: programs},
            loaded=lambda model, size: None,
            compiled=lambda program: None,
        )
    except BaseException:
        programs.free()
        raise


def _must_be(life: ManagedModel, status: ModelStatus, done: str) -> None:
    if life.status != status:
        reason = "" if life.error is None else f" ({life.error})"
        raise WrongState(f"{life.name} cannot be {done}: it is {life.status}{reason}")
