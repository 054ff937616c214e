"""Prefix cache: reuses the keys and values of a prefix that is in the pool already.

Only full blocks are shared, and a request writes only to blocks that no other request can find, so
no block is ever copied. The last token of a prefix is always computed, because its logits are
needed. It is written to the first block after the cached ones.

Invariants:

- A block can be found as soon as the step that fills it is built: the device runs steps in order,
  so a step that reads the block comes later. Blocks that decode steps filled can be found when
  their request has ended or was preempted, up to the tokens that the host has read. If a step
  fails, the unit ends, and its cache with it.
- A block with references stays in the pool. Without references it is cached, and counts as free for
  quotas, admission and preemption (`allocator.py`), which therefore decide as without a cache.
- Allocation uses empty slabs first, then cached blocks. If the model may lease no more slabs, these
  are its oldest cached blocks. Otherwise they are idle slabs of the model that is furthest above
  its floor, where idle slabs count as held. The blocks that a model caches within its floor are
  thus evicted last.
- Cached blocks are not used if that would lease more slabs than packing the whole request, unless
  the model may lease spare slabs (`KVCacheManager`).

Requests that need every position computed find nothing: those with `prompt_logprobs`, and those
with a repetition penalty, for which the device must read every token of the prompt. With any other
penalty, the device must read the tokens that were emitted before a preemption.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heapreplace
from itertools import islice
from typing import NamedTuple

from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.prefix_index import PrefixIndex, extend_keys
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request, RequestState


class CachedPrefix(NamedTuple):
    """The blocks that hold the beginning of a prefix, and the replica that they belong to."""

    replica: int
    blocks: list[int]


NO_PREFIX = CachedPrefix(-1, [])
"""Result of a lookup that found nothing."""


class PrefixCache:
    """The blocks of a unit that requests can find.

    Args:
      models: state of each model.
      allocator: the pool.
      quotas: floors and quotas.
      enabled: if False, no block is ever found or kept.
    """

    def __init__(
        self,
        models: Mapping[str, ModelState],
        allocator: SlabAllocator,
        quotas: KVQuotas,
        enabled: bool,
    ) -> None:
        self._models = models
        self._allocator = allocator
        self._quotas = quotas
        self._enabled = enabled
        self._indices = {name: PrefixIndex() for name in models}

    # Models

    def add_model(self, name: str) -> None:
        """Adds a model with an empty index."""
        self._indices[name] = PrefixIndex()

    def remove_model(self, name: str) -> None:
        """Evicts all cached blocks of a model without requests, and removes its index."""
        self._allocator.evict_slabs(name, self._allocator.idle_slabs_of(name))
        del self._indices[name]

    # Lookup

    def find(self, state: ModelState, request: Request) -> CachedPrefix:
        """Finds the longest cached beginning of a waiting request's prefix.

        Only replicas with a free slot are considered.
        """
        if not self._enabled:
            return NO_PREFIX
        spec = state.spec
        count = _reusable_tokens(request) // spec.tokens_per_page
        if not count:
            return NO_PREFIX
        keys = extend_keys(request, spec.tokens_per_page, count)
        index, longest = self._indices[spec.name], NO_PREFIX
        replicas = (
            {0} if spec.replicas == 1 else {slot % spec.replicas for slot in state.free_slots}
        )
        for replica in sorted(replicas):
            blocks = index.find(replica, islice(keys, count))
            if len(blocks) > len(longest.blocks):
                longest = CachedPrefix(replica, blocks)
        return longest

    def record_lookup(self, state: ModelState, request: Request) -> None:
        """Adds a request's first admission to the counters of prompt tokens looked up and found."""
        if self._enabled and not request.preemptions and _reusable_tokens(request):
            request.cached_tokens = min(request.found_tokens, len(request.prompt))
            state.prefix_queries += len(request.prompt)
            state.prefix_hits += request.cached_tokens

    # Blocks that can be found

    def note_written(self, request: Request) -> None:
        """Adds the blocks of a request that steps built so far have filled to the index."""
        if not self._enabled:
            return
        spec = self._models[request.model].spec
        written = request.dispatched
        if request.state is RequestState.RUNNING:
            # A token is written by the step after the one that generated it, so the last token
            # that the host has read may not be in the pool yet.
            written = max(written, request.num_tokens - 1)
        count = written // spec.tokens_per_page
        first = request.findable_blocks
        if count <= first:
            return
        index, replica = self._indices[request.model], request.slot % spec.replicas
        keys = extend_keys(request, spec.tokens_per_page, count)
        index.add(replica, keys[first:count], request.blocks[first:count])
        request.findable_blocks = count

    def release(self, request: Request) -> None:
        """Drops a request's references to its blocks; blocks in the index stay cached."""
        self.note_written(request)
        # The end of a prefix is useless without its beginning, so it is freed, and evicted, first.
        keep = self._indices[request.model].blocks
        self._allocator.free(request.model, request.blocks[::-1], keep)

    # Eviction

    def evict_to_fit(self, model: str, num_blocks: int, spare_slabs: int, replica: int) -> None:
        """Evicts cached blocks until `SlabAllocator.allocate` can allocate `num_blocks` blocks.

        The quotas must permit the slabs that this needs.

        Args:
          model: the model that needs blocks.
          num_blocks: number of blocks.
          spare_slabs: slabs that the model may lease instead of evicting its cached blocks.
          replica: the replica that needs the blocks.
        """
        allocator = self._allocator
        missing = num_blocks - allocator.free_blocks(model, replica)
        if missing <= 0 or not (self._indices[model] or allocator.idle_slabs):
            return
        limit = max(allocator.slabs_to_lease(model, num_blocks, replica=replica), spare_slabs)
        while missing > 0 and limit > 0 and allocator.lease_idle_slab(model, replica):
            missing = num_blocks - allocator.free_blocks(model, replica)
            limit -= 1
        if missing <= 0:
            return
        size = allocator.blocks_per_slab(model)
        empty = min(limit, allocator.empty_slabs)
        slabs = max(empty, allocator.slabs_to_lease(model, num_blocks, replica=replica))
        index = self._indices[model]
        for _ in range(missing - slabs * size):
            index.remove([allocator.evict_block(model, replica)])
            missing -= 1
        self._evict_idle_slabs(-(-missing // size) - allocator.empty_slabs)

    def _evict_idle_slabs(self, count: int) -> None:
        """Empties idle slabs, each of the model that is then furthest above its floor."""
        if count <= 0:
            return
        floors = self._quotas.floors
        holders = [
            (name, held - floors[name], idle)
            for name, held, idle in self._allocator.held_slabs()
            if idle
        ]
        for name, slabs in choose_evictions(holders, count).items():
            self._indices[name].remove(self._allocator.evict_slabs(name, slabs))

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if a cached block cannot be found, or a findable one can change."""
        allocator = self._allocator
        for name, state in self._models.items():
            index, layers = self._indices[name], state.spec.num_layers
            cached = [block for block in index if not allocator.references(block)]
            assert -(-len(cached) // state.spec.replicas) * layers == allocator.cached_pages(name)
            for request in state.holders():
                final = request.findable_blocks
                assert final * state.spec.tokens_per_page <= request.num_tokens
                assert request.found_tokens <= final * state.spec.tokens_per_page
                for block in request.blocks[final:]:  # the request may still write to these
                    assert block not in index
                    assert allocator.references(block) == 1


def choose_evictions(holders: Iterable[tuple[str, int, int]], count: int) -> dict[str, int]:
    """Distributes evictions of slabs over models.

    The result is as if slabs were evicted one by one, each from the model that is then furthest
    above its floor; of equal models, the first.

    Args:
      holders: for each model: name, slabs above its floor, idle slabs.
      count: number of slabs to evict; at most all idle slabs together.

    Returns:
      Number of slabs to evict, for each model that loses some.
    """
    heap = [(-above, index, idle, name) for index, (name, above, idle) in enumerate(holders)]
    heapify(heap)
    evictions: dict[str, int] = {}
    while count > 0:
        rank, index, idle, name = heap[0]
        # Evict several at once, until another model is further above its floor. The second
        # smallest element of a heap is one of the two behind the first.
        next_rank, next_index = min(heap[1:3], default=(rank + idle, index))[:2]
        batch = min(count, idle, next_rank - rank + (index < next_index))
        evictions[name] = evictions.get(name, 0) + batch
        count -= batch
        if idle > batch:
            heapreplace(heap, (rank + batch, index, idle - batch, name))
        else:
            heappop(heap)
    return evictions


def _reusable_tokens(request: Request) -> int:
    """Number of tokens of a waiting request's prefix that need not be computed if cached."""
    params = request.params
    if params.prompt_logprobs is not None or params.repetition_penalty != 1.0:
        return 0
    last = request.num_tokens - 1
    return min(last, len(request.prompt)) if params.penalized else last
