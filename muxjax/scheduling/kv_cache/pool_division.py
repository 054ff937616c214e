"""A pool that is divided once, for baselines. `policies/registry.py` says which policy uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.kv_cache.quotas import KVQuotas, apportion, slabs_for_request
from muxjax.scheduling.specs import ModelSpec


class FixedPool(KVQuotas):
    """Each model has a part of the pool that no other may use, and that never changes.

    A baseline: servers that set aside memory for each model. Parts are in proportion to the need,
    and hold one request of full length at least. A part that is also its floor cannot be borrowed.

    Raises:
      PoolTooSmall: one request of full length of each model does not fit.
    """

    def _parts(
        self, specs: Sequence[ModelSpec], needs: Mapping[str, float]
    ) -> tuple[dict[str, int], dict[str, int]]:
        super()._parts(specs, needs)  # refuses a pool that is too small
        allocator = self._allocator
        least = [slabs_for_request(spec, allocator, spec.max_model_len) for spec in specs]
        if sum(least) > allocator.num_slabs:
            pages = allocator.slab_pages
            raise PoolTooSmall(
                f"pool too small: with a part of its own for each model, one request of full "
                f"length of each takes {sum(least) * pages} pages, and there are "
                f"{allocator.num_slabs * pages}; raise `pool.memory`, lower `max_model_len`, or "
                f"take a policy that shares the pool"
            )
        weights = [max(0.0, needs[spec.name]) for spec in specs]
        parts = apportion(allocator.num_slabs, weights, least)
        own = {spec.name: part for spec, part in zip(specs, parts, strict=True)}
        return dict(own), own

    def due(self, now: float) -> bool:
        """Never: nothing moves."""
        del now
        return False
