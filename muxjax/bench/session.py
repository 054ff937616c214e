"""A fleet that is loaded and compiled once and gets a new scheduler for each run.

Weights, compiled programs and the pool's array are reused. Every run has a new scheduler with
initial quotas and an empty pool, so that runs differ only in their policy. The scheduler is built
as in `Fleet.load`, from the fleet file with another `policy`.
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
from muxjax.executor.compilation_cache import enable_compilation_cache
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.executor.programs import Buckets
from muxjax.placement.costs.model_shape import ModelShape
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.policies.registry import policy_names
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import LatencySlo, ModelSpec
from muxjax.scheduling.steps import ExecutorModel, Handle, Step, StepResult
from muxjax.units.build import load_programs, load_progress
from muxjax.units.build_unit_spec import build_unit_spec
from muxjax.units.plan_inputs import model_shape
from muxjax.units.unit_spec import UnitSpec


class BenchSession:
    """A loaded fleet for benchmarks, from `BenchSession.load`; a context manager.

    Attributes:
      config: the fleet file.
      models: the models, as in `Fleet.models`.
      buckets: compiled sizes of each model.
      specs: the models as the scheduler sees them.
      executor: runs steps; must not be used while an engine uses it.
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
        self._schedulers: dict[tuple[str, bool], Scheduler] = {
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
        """The shape of each model, for a `ProfileTable`."""
        return {
            name: model_shape(model.config, weight_bits=32.0, embed_bits=32.0, kv_bits=32.0)
            for name, model in self.models.items()
        }

    def new_scheduler(
        self,
        policy: str,
        estimates: StepEstimates | None = None,
        targets: Mapping[str, LatencySlo] | None = None,
        rates: Mapping[str, float] | None = None,
        *,
        prefix_cache: bool = True,
    ) -> Scheduler:
        """Builds a new scheduler.

        Args:
          policy: the scheduling policy.
          estimates: initial step times; copied. By default the scheduler has none.
          targets: latency targets by model, in place of the fleet file's.
          rates: expected requests per second by model, in place of the fleet file's.
          prefix_cache: False disables the prefix cache, for simulated prompts without tokens.

        Raises:
          BenchError: an unknown policy, or one that needs a different pool.
        """
        cached = prefix_cache and self.config.pool.prefix_cache
        if (policy, cached) not in self._schedulers:
            check_policies([policy])
            pool = self.config.pool.model_copy(update={"prefix_cache": cached})
            plan = build_unit_spec(
                self.config.model_copy(update={"policy": policy, "pool": pool}), progress=False
            )
            if plan.kv != self._kv:
                raise BenchError(
                    f"{policy} needs a different pool, so it cannot be compared in this session"
                )
            self._schedulers[policy, cached] = plan.build_scheduler()
        scheduler = copy.deepcopy(self._schedulers[policy, cached])
        if estimates is not None:
            scheduler.estimates = copy.deepcopy(estimates)
        specs = dict(self.specs)
        if targets is not None:
            specs |= {name: replace(specs[name], targets=slo) for name, slo in targets.items()}
        if rates is not None:
            specs |= {name: _with_rate(specs[name], rate) for name, rate in rates.items()}
        if specs != self.specs:
            scheduler.update_models(specs.values())
        return scheduler

    @contextmanager
    def engine(self, scheduler: Scheduler) -> Iterator[Engine]:
        """Runs an engine on a scheduler; at the end no step is in flight and the pool remains."""
        engine = Engine(scheduler, _SharedExecutor(self.executor))
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
    """Raises BenchError for an unknown policy."""
    for name in names:
        if name not in policy_names():
            raise BenchError(f"no policy {name!r}; there are {', '.join(policy_names())}")


def _with_rate(spec: ModelSpec, rate: float) -> ModelSpec:
    return replace(spec, load=replace(spec.load, rate=rate))


class _SharedExecutor:
    """An executor that outlives the engines that use it."""

    def __init__(self, executor: JaxExecutor) -> None:
        self.submit: Callable[[Step], Handle] = executor.submit
        self.result: Callable[[Any], StepResult] = executor.result

    def add_model(self, name: str, model: ExecutorModel) -> None:
        raise NotImplementedError("the models of a benchmark session are fixed")

    def remove_model(self, name: str) -> None:
        raise NotImplementedError("the models of a benchmark session are fixed")

    def close(self) -> None:
        """Does nothing: the session closes the executor."""
