"""The models of one unit, and the division of its pool and device time among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.demand import DemandFunction
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.fair_share import FairShare, StepKey
from muxjax.scheduling.in_flight_steps import InFlightSteps
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.prefix_cache import PrefixCache
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.specs import Demand, ModelSpec

SHARES_PERIOD = 3.0
"""Seconds between computations of the time shares from newer step estimates."""


class UnitModels:
    """The models of a unit with their KV quotas and time shares; base of `Scheduler`.

    A base class and not a member: `Scheduler` reads these attributes several times a step.

    Args:
      specs: the models.
      num_pages: number of pages in the pool.
      demand: expected demand of the models; called again every few seconds with newer estimates.
      estimates: step durations; None: initial guesses.
      kv_quotas: division of the pool.
      concurrent: steps may end in any order.
      prefix_cache: reuse the pages of prompts with a common prefix.
      record_freed: record freed pages (test mode).

    Raises:
      ValueError: no model, two models of one name, or `prefix_cache` with `concurrent`.
      PoolTooSmall: the pool cannot hold one request of full length of each model.

    Attributes:
      models: state of each model, by name.
      estimates: step durations.
      allocator: the pool's allocator.
      quotas: KV quotas and floors of the models.
      fair_share: shares of the device time.
      models_version: number of times that models were added, removed or updated.
    """

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        num_pages: int,
        *,
        demand: DemandFunction,
        estimates: StepEstimates | None,
        kv_quotas: type[KVQuotas],
        concurrent: bool,
        prefix_cache: bool,
        record_freed: bool,
    ) -> None:
        specs = list(specs)
        names = [spec.name for spec in specs]
        if not specs or len(set(names)) != len(names):
            raise ValueError(f"a unit needs at least one model and distinct names, not {names}")
        if prefix_cache and concurrent:
            raise ValueError("concurrent steps may read a cached block before it is written")
        self.models = {spec.name: ModelState(spec) for spec in specs}
        self.estimates = estimates or StepEstimates(names)
        self.allocator = _create_allocator(specs, num_pages, record_freed)
        self._in_flight = InFlightSteps(concurrent=concurrent)
        self._demand = demand
        demands = demand(specs, self.estimates)
        self.quotas = kv_quotas(specs, self.allocator, {name: demands[name].kv for name in names})
        self.fair_share = FairShare(names)
        self._set_shares(demands)
        self._next_shares: float | None = None
        self._prefixes = PrefixCache(self.models, self.allocator, self.quotas, prefix_cache)
        self.models_version = 0

    def add_model(self, spec: ModelSpec) -> None:
        """Adds a model and recomputes KV quotas and time shares.

        Raises:
          ValueError: the name is taken, or the model's blocks do not fit the pool's slabs.
          PoolTooSmall: the pool cannot hold a request of full length of some model. Nothing is
            changed.
        """
        self.allocator.add_model(spec.name, spec.num_layers, spec.replicas)
        self.estimates.add_model(spec.name)
        specs = [*(state.spec for state in self.models.values()), spec]
        try:
            self._divide(specs)
        except PoolTooSmall:
            self.allocator.remove_model(spec.name)
            raise
        self.models[spec.name] = ModelState(spec)
        self._prefixes.add_model(spec.name)

    def remove_model(self, name: str) -> None:
        """Removes an idle model; its KV quota and time share go to the other models.

        Raises:
          ValueError: the model has requests or steps in flight.
        """
        if not self.is_idle(name):
            raise ValueError(f"{name} has requests or steps in flight")
        self._divide([state.spec for state in self.models.values() if state.spec.name != name])
        self._prefixes.remove_model(name)
        self.allocator.remove_model(name)
        del self.models[name]

    def update_models(self, specs: Iterable[ModelSpec]) -> None:
        """Updates expected load, KV floors and SLOs of models. Their shapes must stay the same.

        Raises:
          PoolTooSmall: the floors leave no room for a request of some model. Nothing is changed.
        """
        updated = {state.spec.name: state.spec for state in self.models.values()}
        updated |= {spec.name: spec for spec in specs}
        self._divide(list(updated.values()))
        for spec in updated.values():
            self.models[spec.name].spec = spec

    def is_idle(self, name: str) -> bool:
        """Whether a model has neither requests nor steps in flight."""
        state = self.models[name]
        if state.has_prefill or state.has_decode:
            return False
        return all(model != name for model, _ in self._in_flight.step_keys())

    def _divide(self, specs: list[ModelSpec]) -> None:
        demands = self._demand(specs, self.estimates)
        self.quotas.divide(specs, {name: demand.kv for name, demand in demands.items()})
        self.fair_share.set_models(demands)
        self._set_shares(demands)
        self.models_version += 1

    def _set_shares(self, demands: Mapping[str, Demand]) -> None:
        seconds: dict[StepKey, float] = {}
        for name, demand in demands.items():
            seconds[name, "prefill"] = demand.prefill_seconds
            seconds[name, "decode"] = demand.decode_seconds
        self.fair_share.set_demand(seconds)

    def _update_shares(self, now: float) -> None:
        """Moves KV quotas and recomputes the time shares, each once in a period."""
        if self.quotas.due(now):
            self.quotas.move(now, [name for name, state in self.models.items() if state.waiting])
        if self._next_shares is None:
            self._next_shares = now + SHARES_PERIOD
        elif now >= self._next_shares:
            self._next_shares = now + SHARES_PERIOD
            specs = [state.spec for state in self.models.values()]
            self._set_shares(self._demand(specs, self.estimates))


def _create_allocator(specs: list[ModelSpec], num_pages: int, record_freed: bool) -> SlabAllocator:
    deepest = max(specs, key=lambda spec: spec.num_layers)
    if num_pages < 2 * deepest.num_layers:
        raise PoolTooSmall(
            f"pool too small: {deepest.name} needs {deepest.num_layers} pages for one block and "
            f"{deepest.num_layers} for the dummy block, and there are {num_pages}; raise "
            f"`pool.memory`"
        )
    layers = {spec.name: spec.num_layers for spec in specs}
    replicas = {spec.name: spec.replicas for spec in specs}
    return SlabAllocator(num_pages, layers, replicas, record_freed=record_freed)
