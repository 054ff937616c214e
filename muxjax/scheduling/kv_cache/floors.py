"""Floors: the slabs of the pool that are guaranteed to each model.

Invariant: `need(m) + floors of the other models <= slabs of the pool` for every model `m`, where
`need(m)` holds one request of full length. A request whose model is alone above its floor can
therefore always run to its end; `preemption.py` relies on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.specs import ModelSpec

DEFAULT_FLOORS = 0.25
"""Total fraction of the pool for the floors of models without `kv_floor`."""


def slabs_for_request(spec: ModelSpec, allocator: SlabAllocator, num_tokens: int) -> int:
    """Fewest slabs that hold one request of `num_tokens` tokens."""
    return allocator.slabs_for(spec.name, spec.blocks_for(num_tokens))


def compute_floors(specs: Iterable[ModelSpec], allocator: SlabAllocator) -> dict[str, int]:
    """Computes the guaranteed slabs of each model.

    `ModelSpec.kv_floor` sets a floor. The other models divide `DEFAULT_FLOORS` of the pool equally.
    Such a floor is at most one request of full length, and all of them are scaled down as far as
    the invariant of this module requires.

    Raises:
      PoolTooSmall: a request of full length does not fit beside the given floors of other models.
    """
    specs = list(specs)
    slabs = allocator.num_slabs
    needs = {spec.name: slabs_for_request(spec, allocator, spec.max_model_len) for spec in specs}
    # The small addend keeps a product such as 0.29 * 100 from being rounded down to 28.
    floors = {
        spec.name: int(spec.kv_floor * slabs + 1e-9) for spec in specs if spec.kv_floor is not None
    }
    _check_fit(specs, allocator, needs, floors)

    defaults = {
        spec.name: min(needs[spec.name], int(DEFAULT_FLOORS * slabs) // len(specs))
        for spec in specs
        if spec.kv_floor is None
    }
    scale = 1.0
    for name, need in needs.items():
        other_given = sum(floor for other, floor in floors.items() if other != name)
        other_defaults = sum(floor for other, floor in defaults.items() if other != name)
        if other_defaults:
            scale = min(scale, (slabs - need - other_given) / other_defaults)
    floors.update({name: int(floor * scale) for name, floor in defaults.items()})
    return {spec.name: floors[spec.name] for spec in specs}


def _check_fit(
    specs: Sequence[ModelSpec],
    allocator: SlabAllocator,
    needs: Mapping[str, int],
    floors: Mapping[str, int],
) -> None:
    """Raises PoolTooSmall if a model's longest request does not fit beside the other floors."""
    for spec in specs:
        others = sum(floor for name, floor in floors.items() if name != spec.name)
        available = allocator.num_slabs - others
        if needs[spec.name] <= available:
            continue
        pages = allocator.slab_pages
        reserved = remedy = ""
        if others:
            reserved = f": `kv_floor` reserves {others * pages} for other models"
            remedy = ", or lower the `kv_floor` of the other models"
        raise PoolTooSmall(
            f"pool too small: {spec.name} needs {needs[spec.name] * pages} pages for one "
            f"{spec.max_model_len}-token request, and {available * pages} of "
            f"{allocator.num_pages} are available to it{reserved}; raise `pool.memory`"
            f"{', ' if others else ' or '}lower its `max_model_len`{remedy}"
        )
