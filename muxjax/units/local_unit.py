"""A unit in this process: its models, their compiled programs, and its engine.

Weights and programs outlive the engine: after its engine has ended, a unit restarts with a new pool
and queue, without loading.

Models are added and removed while the engine runs. The new state (`spec`, which models sleep) is
recorded first and then applied in the engine's thread, between two steps. If the engine ends before
that, the next engine is started from the recorded state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from muxjax.engine.engine import Engine
from muxjax.engine.loaded_model import LoadedModel
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.errors import EngineDead
from muxjax.executor.model_slots import allocate_slots
from muxjax.executor.programs import ModelPrograms
from muxjax.scheduling.routing import PlannedLoad
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Executor, HasPoolAddress
from muxjax.units.unit_spec import ModelBuildSpec, UnitSpec

_LAST_STEP_TIMEOUT = 60.0
"""Seconds to wait for the last step of a model that has no requests."""
_RETRY_SECONDS = 0.002
"""Wait between two attempts to change a model whose last step has not ended."""

ExecutorFactory = Callable[[Mapping[str, ModelPrograms]], Executor]
"""Creates a unit's executor from the programs of its awake models."""


class LocalUnit(UnitSupervisor[Engine]):
    """One unit on the devices of this process.

    Args:
      name: in the plan; "0" in a fleet without one.
      spec: its models, devices and pool.
      programs: of its models, compiled and with weights unless the model sleeps. If empty, and
        without `executor_factory`, no engine is started.
      planned_load: what the plan expects of the unit.
      executor_factory: creates the executor at every start of the engine; the unit's models are
        then fixed. By default `spec.build_executor`, and models can be added and removed.

    Attributes:
      spec: its models, devices and pool.
      programs: of its models by name; those of a sleeping model may not be compiled yet.
    """

    def __init__(
        self,
        name: str,
        spec: UnitSpec,
        programs: Mapping[str, ModelPrograms],
        *,
        planned_load: PlannedLoad | None = None,
        executor_factory: ExecutorFactory | None = None,
    ) -> None:
        self.spec = spec
        self.programs = dict(programs)
        self._executor_factory = executor_factory
        self._executor: Executor | None = None
        self._sleeping = {n for n in self.programs if not self.programs[n].ready}
        self._scheduler = spec.build_scheduler()
        has_engine = bool(programs) or executor_factory is not None
        super().__init__(
            name, spec.models, self._start_engine if has_engine else None, planned_load
        )

    def _start_engine(self) -> Engine:
        awake = {n: p for n, p in self.programs.items() if n not in self._sleeping}
        build_executor = self._executor_factory or self.spec.build_executor
        executor = build_executor(awake)
        self._executor, self._scheduler = executor, self.spec.build_scheduler(self._sleeping)
        return Engine(self._scheduler, executor, poison=self.spec.poison)

    @property
    def supervisor(self) -> UnitSupervisor:
        """See `ServedUnit`."""
        return self

    @property
    def models(self) -> dict[str, LoadedModel]:
        """Its models by name, sleeping ones included."""
        return self.spec.models

    def is_awake(self, name: str) -> bool:
        """Returns whether a model has its quota of the pool."""
        return name not in self._sleeping

    @property
    def can_change_models(self) -> bool:
        """Whether models can be added and removed: no other process runs the same steps."""
        return self._executor_factory is None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of awake models, on each device."""
        models = self.spec.models.items()
        return sum(model.param_bytes for name, model in models if name not in self._sleeping)

    # Changes of models. The callers hold the model's lock (`registry.ManagedModel`).

    def check_fits(self, spec: ModelBuildSpec) -> None:
        """Checks that the pool, with its present layout, can hold a new model.

        Raises:
          ValueError, PoolTooSmall: the model does not fit.
          EngineDead: the engine has ended.
        """

        def check(scheduler: Scheduler) -> None:
            if spec.model.name not in scheduler.models:
                scheduler.add_model(spec.spec)
                scheduler.remove_model(spec.model.name)

        self.engine.call(check)

    def register(self, spec: ModelBuildSpec, programs: ModelPrograms) -> None:
        """Records a model as sleeping; a model of the same name is replaced."""
        name = spec.model.name
        with self._changing:
            self.spec = self.spec.add_model(spec)
            self.programs[name] = programs
            self._sleeping.add(name)
            self.model_names = frozenset(self.spec.model_specs)

    def unregister(self, name: str) -> ModelPrograms:
        """Drops a sleeping model that is not the unit's last, and returns its programs."""
        with self._changing:
            self.spec = self.spec.remove_model(name)
            self._sleeping.discard(name)
            self.model_names = frozenset(self.spec.model_specs)
            return self.programs.pop(name)

    def activate(self, name: str) -> None:
        """Allocates the pool quota and slots of a sleeping model whose programs are ready.

        Raises:
          ValueError, PoolTooSmall: there is no room beside the other awake models.
        """
        slots = allocate_slots(self.programs[name])
        spec = self.spec.model_specs[name].spec

        def change(scheduler: Scheduler, executor: Executor) -> bool:
            if name not in scheduler.models:  # a restarted engine may already have it
                scheduler.add_model(spec)
                executor.add_model(name, slots)
            return True

        with self._changing:
            self._sleeping.discard(name)
        try:
            self._apply_between_steps(change)
        except Exception:
            with self._changing:
                self._sleeping.add(name)
            raise

    def deactivate(self, name: str) -> None:
        """Releases the pool quota and slots of a model that has no requests.

        Raises:
          TimeoutError: its last step does not end.
        """

        def change(scheduler: Scheduler, executor: Executor) -> bool:
            if name not in scheduler.models:
                return True
            if not scheduler.is_idle(name):
                return False
            scheduler.remove_model(name)
            executor.remove_model(name)
            return True

        with self._changing:
            self._sleeping.add(name)
        try:
            self._apply_between_steps(change)
        except Exception:
            with self._changing:
                self._sleeping.discard(name)
            raise

    def update_expectations(self, specs: Sequence[ModelBuildSpec]) -> None:
        """Changes the expected load, floor and SLO of models, all at the same time.

        Args:
          specs: from `ModelBuildSpec.update_expectations`.

        Raises:
          PoolTooSmall: the floors leave no room for a request of some model; nothing is changed.
        """
        unit_spec = self.spec
        for spec in specs:
            unit_spec = unit_spec.add_model(spec)
        unit_spec.build_scheduler()  # raises PoolTooSmall

        def change(scheduler: Scheduler, executor: Executor) -> bool:
            awake = [spec.spec for spec in specs if spec.model.name in scheduler.models]
            scheduler.update_models(awake)
            return True

        self._apply_between_steps(change)
        with self._changing:
            self.spec = unit_spec

    def _apply_between_steps(self, change: Callable[[Scheduler, Executor], bool]) -> None:
        """Calls `change` in the engine's thread until it returns True."""
        with self._changing:
            engine, executor = self._engine, self._executor
        if engine is None or executor is None:
            return
        deadline = time.monotonic() + _LAST_STEP_TIMEOUT
        try:
            while not engine.call(lambda scheduler: change(scheduler, executor)):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"unit {self.name} has a step that does not end")
                time.sleep(_RETRY_SECONDS)
        except EngineDead:
            return  # the next engine is started from the recorded state

    # Statistics

    def state(self) -> dict[str, Any]:
        """Returns the counters without calling the engine; they may be inconsistent."""
        return self._scheduler.stats()

    def stats(self) -> dict[str, Any]:
        """Returns counters and gauges: pool, quotas, queues, and the compiled programs.

        Raises:
          EngineDead: the engine has ended.
        """
        engine, executor = self._engine, self._executor
        stats = self.state() if engine is None else engine.stats()
        stats["pool_address"] = None
        if engine is not None and isinstance(executor, HasPoolAddress):
            # In the engine's thread: each step donates the pool's array and returns a new array
            # in the same memory.
            stats["pool_address"] = engine.call(lambda scheduler: executor.pool_address)
        stats["devices"] = [device.id for device in self.spec.devices]
        stats["pool_bytes"] = self.spec.pool_bytes
        stats["page_rows"] = self.spec.kv.shape[1]
        stats["restarts"] = self.restarts
        stats["programs"] = [
            {
                "model": program.model,
                "kind": program.kind,
                "size": program.size,
                "compile_seconds": program.compile_seconds,
                "temp_bytes": program.temp_bytes,
                "argument_bytes": program.argument_bytes,
            }
            for programs in list(self.programs.values())
            for program in programs.programs()
        ]
        return stats
