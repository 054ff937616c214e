"""Other divisions of the pool, for baselines: none, or fixed parts.

`policies/registry.py` lists the policies that use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.kv_cache.apportion import apportion
from muxjax.scheduling.kv_cache.floors import slabs_for_request
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.specs import ModelSpec


class OpenPool(KVQuotas):
    """A pool without quotas: free pages go to the request that needs them first.

    The quota of every model is the whole pool and never moves, and no floor is guaranteed. This is
    the baseline of a server without quotas.

    Raises:
      PoolTooSmall: a request of full length of some model could never run.
    """

    reclaims = False

    def _compute_floors_and_quotas(
        self, specs: Sequence[ModelSpec], needs: Mapping[str, float]
    ) -> tuple[dict[str, int], dict[str, int]]:
        floors, _ = super()._compute_floors_and_quotas(specs, needs)  # raises PoolTooSmall
        return dict.fromkeys(floors, 0), dict.fromkeys(floors, self._allocator.num_slabs)

    def due(self, now: float) -> bool:
        """Returns False: quota never moves."""
        self._now = now
        return False

    def check_invariants(self) -> None:
        """Raises AssertionError if a model has a floor, or a quota below the whole pool."""
        assert set(self.quotas.values()) <= {self._allocator.num_slabs}
        assert not any(self.floors.values())


class FixedPool(KVQuotas):
    """A pool divided into fixed parts, one for each model, which no other model can borrow.

    The parts are in proportion to the need, and each holds at least one request of full length.
    Each part is both quota and floor. This is the baseline of servers that reserve memory for each
    model.

    Raises:
      PoolTooSmall: the pool cannot hold one request of full length of each model.
    """

    def _compute_floors_and_quotas(
        self, specs: Sequence[ModelSpec], needs: Mapping[str, float]
    ) -> tuple[dict[str, int], dict[str, int]]:
        super()._compute_floors_and_quotas(specs, needs)  # raises PoolTooSmall
        allocator = self._allocator
        minima = [slabs_for_request(spec, allocator, spec.max_model_len) for spec in specs]
        if sum(minima) > allocator.num_slabs:
            pages = allocator.slab_pages
            raise PoolTooSmall(
                f"pool too small: with a fixed part for each model, one request of full length of "
                f"each needs {sum(minima) * pages} pages, and there are "
                f"{allocator.num_slabs * pages}; raise `pool.memory`, lower `max_model_len`, or "
                f"choose a policy that shares the pool"
            )
        weights = [max(0.0, needs[spec.name]) for spec in specs]
        sizes = apportion(allocator.num_slabs, weights, minima)
        parts = {spec.name: size for spec, size in zip(specs, sizes, strict=True)}
        return dict(parts), parts

    def due(self, now: float) -> bool:
        """Returns False: quota never moves."""
        del now
        return False
