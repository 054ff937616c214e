"""A unit of a fleet: what it holds, its compiled programs, and its engine.

Weights and programs outlive the engine, so that a unit whose loop has ended is back in the time
that an empty pool takes.

Models come and go while the engine runs. What is to be is written down first (`plan`, which models
are awake) and then done in the engine's loop, between two steps; an engine that ends before it has
done it is followed by one that is made from what is written down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from muxjax.engine.engine import Engine
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.errors import EngineDead
from muxjax.executor.jax_executor import JaxExecutor, start_model
from muxjax.executor.programs import ModelPrograms
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Executor
from muxjax.units.unit_spec import LoadedModel, ModelBuildSpec, UnitSpec

_LAST_STEP_SECONDS = 60.0
"""For the last step of a model whose requests have ended."""


class LocalUnit(UnitSupervisor[Engine]):
    """One unit on the devices.

    Args:
      name: in the plan; "0" in a fleet without one.
      plan: what it holds.
      programs: of its models; without any it is only looked at.
      poison: test mode, see `Fleet.load`.
      seconds: see `UnitSupervisor`.
      make_executor: runs the steps instead of the programs, to measure what is around them.

    Attributes:
      plan: what it holds.
      programs: of its models by name; those of a model that sleeps may not be compiled yet.
    """

    def __init__(
        self,
        name: str,
        plan: UnitSpec,
        programs: Mapping[str, ModelPrograms],
        *,
        poison: bool = False,
        seconds: Mapping[str, float] | None = None,
        make_executor: Callable[[], Executor] | None = None,
    ) -> None:
        self.plan = plan
        self.programs = dict(programs)
        self._poison = poison
        self._make_executor = make_executor
        self._executor: Executor | None = None
        self._asleep = {n for n in self.programs if not self.programs[n].ready}
        self._unit = plan.make_unit()
        runs = bool(programs) or make_executor is not None
        super().__init__(name, plan.models, self._start_engine if runs else None, seconds)

    def _start_engine(self) -> Engine:
        executor: Executor
        if self._make_executor is not None:
            executor = self._make_executor()
        else:
            awake = {n: made for n, made in self.programs.items() if n not in self._asleep}
            executor = JaxExecutor(
                self.plan.devices,
                awake,
                self.plan.kv,
                dummy_pages=self.plan.dummy_pages,
                poison=self._poison,
            )
        self._executor, self._unit = executor, self.plan.make_unit(self._asleep)
        return Engine(self._unit, executor, poison=self._poison)

    @property
    def models(self) -> dict[str, LoadedModel]:
        """What it holds, by name; those that sleep included."""
        return self.plan.models

    def is_awake(self, name: str) -> bool:
        """Whether a model of it has its part of the pool."""
        return name not in self._asleep

    @property
    def changeable(self) -> bool:
        """Whether models may come and go: nobody else runs its steps as well."""
        return self._make_executor is None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of models that are awake, on each device."""
        models = self.plan.models.items()
        return sum(model.param_bytes for name, model in models if name not in self._asleep)

    # Models that come and go; called by `lifecycle.py`, one at a time for each model

    def try_out(self, part: ModelBuildSpec) -> None:
        """Sees whether the pool, as it is cut now, takes a model.

        Raises:
          ValueError, PoolTooSmall: it does not.
          EngineDead: the loop has ended.
        """

        def look(unit: Scheduler) -> None:
            if part.model.name not in unit.models:
                unit.add_model(part.spec)
                unit.remove_model(part.model.name)

        self.engine.call(look)

    def register(self, part: ModelBuildSpec, programs: ModelPrograms) -> None:
        """Writes down a model, asleep, in place of the one of its name if there is one."""
        name = part.model.name
        with self._changing:
            self.plan = self.plan.having(part)
            self.programs[name] = programs
            self._asleep.add(name)
            self.model_names = frozenset(self.plan.parts)

    def forget(self, name: str) -> ModelPrograms:
        """Drops a model that sleeps, and is not the last; gives its programs."""
        with self._changing:
            self.plan = self.plan.without(name)
            self._asleep.discard(name)
            self.model_names = frozenset(self.plan.parts)
            return self.programs.pop(name)

    def admit(self, name: str) -> None:
        """Gives a model that sleeps, and is ready, its part of the pool and its slots.

        Raises:
          ValueError, PoolTooSmall: there is no room beside the others as they are now.
        """
        started = start_model(self.programs[name])
        part = self.plan.parts[name]

        def change(unit: Scheduler, executor: Executor) -> bool:
            if name not in unit.models:  # an engine that was just started may have it
                unit.add_model(part.spec)
                if isinstance(executor, JaxExecutor):
                    executor.add_model(started)
            return True

        with self._changing:
            self._asleep.discard(name)
        try:
            self._in_loop(change)
        except Exception:
            with self._changing:
                self._asleep.add(name)
            raise

    def retire(self, name: str) -> None:
        """Takes a model without requests its part of the pool and its slots.

        Raises:
          TimeoutError: its last step does not end.
        """

        def change(unit: Scheduler, executor: Executor) -> bool:
            if name not in unit.models:
                return True
            if not unit.is_idle(name):
                return False
            unit.remove_model(name)
            if isinstance(executor, JaxExecutor):
                executor.remove_model(name)
            return True

        with self._changing:
            self._asleep.add(name)
        try:
            self._in_loop(change)
        except Exception:
            with self._changing:
                self._asleep.discard(name)
            raise

    def expect(self, parts: Sequence[ModelBuildSpec]) -> None:
        """Takes other expectations, floors and targets of models, all at once.

        Raises:
          PoolTooSmall: the floors leave no room for a request of some model; nothing is changed.
        """
        plan = self.plan
        for part in parts:
            plan = plan.having(part)
        plan.make_unit()

        def change(unit: Scheduler, executor: Executor) -> bool:
            awake = [part.spec for part in parts if part.model.name in unit.models]
            unit.update_models(awake)
            return True

        self._in_loop(change)
        with self._changing:
            self.plan = plan

    def _in_loop(self, change: Callable[[Scheduler, Executor], bool]) -> None:
        """Calls a function between two steps until it is true."""
        with self._changing:
            engine, executor = self._engine, self._executor
        if engine is None or executor is None:
            return
        ends = time.monotonic() + _LAST_STEP_SECONDS
        try:
            while not engine.call(lambda unit: change(unit, executor)):
                if time.monotonic() > ends:
                    raise TimeoutError(f"unit {self.name} has a step that does not end")
                time.sleep(0.002)
        except EngineDead:
            return  # the next engine is made from what is written down

    # What is shown

    def state(self) -> dict[str, Any]:
        """The counters, read without asking the engine, which may be changing them."""
        return self._unit.stats()

    def stats(self) -> dict[str, Any]:
        """Counters and gauges: pool, quotas, queues, and the compiled programs.

        Raises:
          EngineDead: its loop has ended.
        """
        engine, executor = self._engine, self._executor
        found = self.state() if engine is None else engine.stats()
        found["pool_address"] = None
        if engine is not None and isinstance(executor, JaxExecutor):
            # On the loop's thread: between steps, as each step takes the pool's array and gives
            # another for the same memory.
            found["pool_address"] = engine.call(lambda unit: executor.pool_address)
        found["devices"] = [device.id for device in self.plan.devices]
        found["pool_bytes"] = self.plan.pool_bytes
        found["page_rows"] = self.plan.kv.shape[1]
        found["restarts"] = self.restarts
        found["programs"] = [
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
        return found
