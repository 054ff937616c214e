"""A unit of a fleet: what it holds, its compiled programs, and its engine.

Weights and programs outlive the engine, so that a unit whose loop has ended is back in the time
that an empty pool takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from muxjax.engine import Engine
from muxjax.jax_executor import JaxExecutor
from muxjax.loading import LoadedModel, Plan
from muxjax.programs import ModelPrograms
from muxjax.runner import Runner
from muxjax.scheduling.steps import Executor


class LiveUnit(Runner[Engine]):
    """One unit on the devices.

    Args:
      name: in the plan; "0" in a fleet without one.
      plan: what it holds.
      programs: compiled, with their parameters; empty for a unit that is only looked at.
      poison: test mode, see `Fleet.load`.
      seconds: see `Runner`.
      make_executor: runs the steps instead of the programs, to measure what is around them.
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        programs: Mapping[str, ModelPrograms],
        *,
        poison: bool = False,
        seconds: Mapping[str, float] | None = None,
        make_executor: Callable[[], Executor] | None = None,
    ) -> None:
        self.plan = plan
        self._programs = dict(programs)
        self._executor: Executor | None = None
        self._unit = plan.make_unit()

        def start() -> Engine:
            executor: Executor
            if make_executor is not None:
                executor = make_executor()
            else:
                executor = JaxExecutor(
                    self._programs, plan.kv, dummy_pages=plan.dummy_pages, poison=poison
                )
            self._executor, self._unit = executor, plan.make_unit()
            return Engine(self._unit, executor, poison=poison)

        runs = bool(programs) or make_executor is not None
        super().__init__(name, plan.models, start if runs else None, seconds)

    @property
    def models(self) -> dict[str, LoadedModel]:
        """What it holds, by name."""
        return self.plan.models

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
            for programs in self._programs.values()
            for program in programs.programs()
        ]
        return found
