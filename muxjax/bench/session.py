"""A fleet that is loaded and compiled once, and scheduled anew for each run.

Weights, compiled programs and the pool's array stay; every run has a scheduler of its own, fresh
quotas and an empty pool, so that policies are compared with nothing else between them. A scheduler
is made as `Fleet.load` makes it, from the fleet file with another `policy`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

from muxjax.config.fleet_file import FleetConfig
from muxjax.engine.engine import Engine
from muxjax.errors import BenchError
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.executor.programs import Buckets
from muxjax.placement.costs.model_shape import ModelShape
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.policies.registry import policy_names
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import LatencySlo, ModelSpec
from muxjax.scheduling.steps import ExecutorModel, Handle, Step, StepResult
from muxjax.units.build import enable_compilation_cache, load_programs, load_progress
from muxjax.units.build_unit_spec import build_unit_spec
from muxjax.units.plan_inputs import model_shape
from muxjax.units.unit_spec import UnitSpec


class BenchSession:
    """Made by `BenchSession.load`; closed with `close`, or by leaving `with`.

    Attributes:
      config: the fleet file.
      models: as `Fleet.models`.
      buckets: what is compiled, for each model.
      specs: the models as the scheduler sees them.
      executor: runs steps; nothing else may while an engine uses it.
    """

    def __init__(self, config: FleetConfig, plan: UnitSpec, executor: JaxExecutor) -> None:
        self.config = config
        self.models = dict(plan.models)
        self.buckets: dict[str, Buckets] = {
            name: spec.buckets for name, spec in plan.model_specs.items()
        }
        self.executor = executor
        self.dummy_pages = plan.dummy_pages
        self.num_pages: int = plan.kv.shape[0]
        self.pool_bytes = plan.pool_bytes
        self.specs = {name: spec.spec for name, spec in plan.model_specs.items()}
        self._kv = plan.kv
        self._fresh: dict[tuple[str, bool], Scheduler] = {
            (config.policy, config.pool.prefix_cache): plan.build_scheduler()
        }

    @classmethod
    def load(cls, config: FleetConfig, *, progress: bool = True) -> Self:
        """Loads all weights and compiles all programs, as `Fleet.load` does.

        Raises:
          CheckpointError, DownloadError, PoolTooSmall, FleetConfigError: see `Fleet.load`.
        """
        enable_compilation_cache()
        plan = build_unit_spec(config, progress=progress)
        with load_progress([plan], show=progress, include_sleeping=True) as bars:
            programs = load_programs(plan, progress=bars, include_sleeping=True)
        return cls(config, plan, plan.build_executor(programs))

    @property
    def shapes(self) -> dict[str, ModelShape]:
        """Of each model, for a `ProfileTable`."""
        return {
            name: model_shape(model.config, weight_bits=32.0, embed_bits=32.0, kv_bits=32.0)
            for name, model in self.models.items()
        }

    def unit(
        self,
        policy: str,
        estimates: StepEstimates | None = None,
        targets: Mapping[str, LatencySlo] | None = None,
        rates: Mapping[str, float] | None = None,
        *,
        prefix_cache: bool = True,
    ) -> Scheduler:
        """A new scheduler.

        Args:
          policy: its policy.
          estimates: step times that it begins with; copied. By default it has to guess.
          targets: of each model, in place of those in the fleet file.
          rates: requests a second that it expects of each model, in place of those in the file.
          prefix_cache: whether it may find prefixes again, where the fleet file allows it: not for
            prompts whose tokens mean nothing.

        Raises:
          BenchError: a policy that there is not, or that needs another pool.
        """
        cached = prefix_cache and self.config.pool.prefix_cache
        if (policy, cached) not in self._fresh:
            check_policies([policy])
            pool = self.config.pool.model_copy(update={"prefix_cache": cached})
            plan = build_unit_spec(
                self.config.model_copy(update={"policy": policy, "pool": pool}), progress=False
            )
            if plan.kv != self._kv:
                raise BenchError(f"{policy} cuts another pool, so it cannot be compared here")
            self._fresh[policy, cached] = plan.build_scheduler()
        unit = copy.deepcopy(self._fresh[policy, cached])
        if estimates is not None:
            unit.estimates = copy.deepcopy(estimates)
        specs = dict(self.specs)
        if targets is not None:
            specs |= {name: replace(specs[name], targets=own) for name, own in targets.items()}
        if rates is not None:
            specs |= {name: _with_rate(specs[name], rate) for name, rate in rates.items()}
        if specs != self.specs:
            unit.update_models(specs.values())
        return unit

    @contextmanager
    def engine(self, unit: Scheduler) -> Iterator[Engine]:
        """Runs a unit; when it ends, nothing is left in flight and the pool stays."""
        engine = Engine(unit, _Kept(self.executor))
        try:
            yield engine
        finally:
            engine.close()

    def close(self) -> None:
        """Frees the pool and the weights."""
        self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_policies(names: Sequence[str]) -> None:
    """Raises BenchError for a policy that there is not."""
    for name in names:
        if name not in policy_names():
            raise BenchError(f"no policy {name!r}; there are {', '.join(policy_names())}")


def _with_rate(spec: ModelSpec, rate: float) -> ModelSpec:
    return replace(spec, load=replace(spec.load, rate=rate))


class _Kept:
    """An executor that outlives the engines it is given to."""

    def __init__(self, executor: JaxExecutor) -> None:
        self.submit: Callable[[Step], Handle] = executor.submit
        self.result: Callable[[Any], StepResult] = executor.result

    def add_model(self, name: str, model: ExecutorModel) -> None:
        raise NotImplementedError("the models of a benchmark session are fixed")

    def remove_model(self, name: str) -> None:
        raise NotImplementedError("the models of a benchmark session are fixed")

    def close(self) -> None:
        """Nothing: the rig closes it."""
