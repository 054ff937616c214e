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
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.executor.programs import Buckets
from muxjax.placement.costs.model_shape import ModelShape
from muxjax.progress import Bars
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.policies.registry import POLICIES
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import LatencySlo
from muxjax.scheduling.steps import Handle, Step, StepResult
from muxjax.units import build as loading
from muxjax.units.plan_inputs import shape_of
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
        self.buckets: dict[str, Buckets] = {name: part.buckets for name, part in plan.parts.items()}
        self.executor = executor
        self.dummy_pages = plan.dummy_pages
        self.num_pages: int = plan.kv.shape[0]
        self.pool_bytes = plan.pool_bytes
        self.specs = {name: part.spec for name, part in plan.parts.items()}
        self._kv = plan.kv
        self._schedulers: dict[tuple[str, bool], Scheduler] = {
            (config.policy, config.pool.prefix_cache): plan.make_unit()
        }

    @classmethod
    def load(cls, config: FleetConfig, *, progress: bool = True) -> Self:
        """Loads all weights and compiles all programs, as `Fleet.load` does.

        Raises:
          CheckpointError, DownloadError, PoolTooSmall, FleetConfigError: see `Fleet.load`.
        """
        loading.enable_compilation_cache()
        plan = loading.build_unit_spec(config, progress=progress)
        programs = loading.make_programs(plan)
        totals = {
            "compiling": sum(len(model.wanted()) for model in programs.values()),
            "loading weights": sum(model.param_bytes for model in plan.models.values()),
        }
        with Bars(totals, show=progress) as bars:
            loading.load_and_compile(
                plan.parts,
                programs,
                loaded=lambda name, size: bars.advance("loading weights", size, name),
                compiled=lambda program: bars.advance("compiling", 1, program.title),
            )
        executor = JaxExecutor(plan.devices, programs, plan.kv, dummy_pages=plan.dummy_pages)
        return cls(config, plan, executor)

    @property
    def shapes(self) -> dict[str, ModelShape]:
        """The shape of each model, for a `ProfileTable`."""
        return {
            name: shape_of(model.config, weight_bits=32.0, embed_bits=32.0, kv_bits=32.0)
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
            plan = loading.build_unit_spec(
                self.config.model_copy(update={"policy": policy, "pool": pool}), progress=False
            )
            if plan.kv != self._kv:
                raise BenchError(
                    f"{policy} needs a different pool, so it cannot be compared in this session"
                )
            self._schedulers[policy, cached] = plan.make_unit()
        scheduler = copy.deepcopy(self._schedulers[policy, cached])
        if estimates is not None:
            scheduler.estimates = copy.deepcopy(estimates)
        specs = dict(self.specs)
        if targets is not None:
            specs |= {name: replace(specs[name], targets=slo) for name, slo in targets.items()}
        if rates is not None:
            specs |= {name: replace(specs[name], rate=rate) for name, rate in rates.items()}
        if specs != self.specs:
            scheduler.change_models(specs.values())
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
        if name not in POLICIES:
            raise BenchError(f"no policy {name!r}; there are {', '.join(POLICIES)}")


class _SharedExecutor:
    """An executor that outlives the engines that use it."""

    def __init__(self, executor: JaxExecutor) -> None:
        self.submit: Callable[[Step], Handle] = executor.submit
        self.result: Callable[[Any], StepResult] = executor.result

    def poison(self, pages: Sequence[int]) -> None:
        raise ValueError("the pool of a bench session is not poisoned")

    def close(self) -> None:
        """Does nothing: the session closes the executor."""
