"""Prefixes that are found again: whose KV is in the pool already is not computed again.

Only full blocks are shared, and a request writes to blocks of its own only, so nothing is ever
copied: what a request finds ends before its last token, which is always computed, as its logits are
wanted, and goes to the block after those found.

- A block can be found from the moment when the step is made that fills it: the device runs steps in
  order, so whoever reads it comes after. Blocks that decoding filled can be found when their
  request has ended or lost its pages, as far as the host has read the tokens. If a step fails the
  unit ends, and its cache with it.
- A block that requests refer to stays. When none does any more it is cached, and counts as free for
  quotas, admission and preemption (`allocator.py`), which thus are the same as without a cache.
- Whoever gets pages takes empty ones first, then cached blocks: those of its own, the oldest first,
  where it may lease no more; else idle slabs, of the model that is most over its floor, what is
  cached counted in. So what a model has cached within its floor goes last.
- Found blocks are not taken where that would lease more slabs than packing the request anew, unless
  these are in nobody's way.

Requests that need all their positions computed find nothing: those that ask for log-probabilities
of the prompt, and those with a repetition penalty, for which the device must see each token of the
prompt. With any other penalty it must see what was put out before a preemption.
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


class Found(NamedTuple):
    """The blocks that hold the beginning of a prefix, and the copy of the model whose they are."""

    copy: int
    blocks: list[int]


NOTHING = Found(-1, [])


class PrefixCache:
    """The findable blocks of a unit.

    Args:
      models: state of each model.
      allocator: the pool.
      quotas: floors and quotas.
      enabled: without, nothing is ever found or kept.
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

    # Models that come and go

    def add_model(self, name: str) -> None:
        """Takes in a model, of which nothing can be found yet."""
        self._indices[name] = PrefixIndex()

    def remove_model(self, name: str) -> None:
        """Frees all that is cached of a model without requests, which is about to leave."""
        self._allocator.evict_slabs(name, self._allocator.idle_slabs_of(name))
        del self._indices[name]

    # What is found, and what can be

    def find(self, state: ModelState, request: Request) -> Found:
        """The longest beginning of a waiting request's prefix that a copy with a free slot has."""
        if not self._enabled:
            return NOTHING
        spec = state.spec
        count = _findable(request) // spec.tokens_per_page
        if not count:
            return NOTHING
        keys = extend_keys(request, spec.tokens_per_page, count)
        index, best = self._indices[spec.name], NOTHING
        replicas = (
            {0} if spec.replicas == 1 else {slot % spec.replicas for slot in state.free_slots}
        )
        for copy in sorted(replicas):
            blocks = index.find(copy, islice(keys, count))
            if len(blocks) > len(best.blocks):
                best = Found(copy, blocks)
        return best

    def note_admitted(self, state: ModelState, request: Request) -> None:
        """Counts what a request was looked up for and found, once in its life."""
        if self._enabled and not request.preemptions and _findable(request):
            request.cached_tokens = min(request.found_tokens, len(request.prompt))
            state.prefix_queries += len(request.prompt)
            state.prefix_hits += request.cached_tokens

    def note_written(self, request: Request) -> None:
        """Makes findable what steps made so far have written of a request that holds pages."""
        if not self._enabled:
            return
        spec = self._models[request.model].spec
        written = request.dispatched
        if request.state is RequestState.RUNNING:
            # The last token that the host knows is written by the step after the one that made it.
            written = max(written, request.num_tokens - 1)
        count = written // spec.tokens_per_page
        first = request.findable_blocks
        if count <= first:
            return
        index, copy = self._indices[request.model], request.slot % spec.replicas
        keys = extend_keys(request, spec.tokens_per_page, count)
        index.add(copy, keys[first:count], request.blocks[first:count])
        request.findable_blocks = count

    def release(self, request: Request) -> None:
        """Gives a request's blocks back; those that can be found stay as long as they may."""
        self.note_written(request)
        # The end of a prefix is of no use without its beginning, so it must be older.
        keep = self._indices[request.model].blocks
        self._allocator.free(request.model, request.blocks[::-1], keep)

    # Room

    def make_room(self, model: str, num_blocks: int, spare: int, copy: int) -> None:
        """Evicts what it takes for `allocate` to succeed, as it may by the quotas.

        Args:
          model: who is to get blocks.
          num_blocks: how many.
          spare: slabs that it may lease, beyond those that it must, rather than lose cached blocks.
          copy: the copy of it whose blocks they are.
        """
        allocator = self._allocator
        missing = num_blocks - allocator.free_blocks(model, copy)
        if missing <= 0 or not (self._indices[model] or allocator.idle_slabs):
            return
        most = max(allocator.slabs_to_lease(model, num_blocks, copy=copy), spare)
        while missing > 0 and most > 0 and allocator.lease_roomy(model, copy):
            missing = num_blocks - allocator.free_blocks(model, copy)
            most -= 1
        if missing <= 0:
            return
        size = allocator.blocks_per_slab(model)
        empty = min(most, allocator.empty_slabs)
        slabs = max(empty, allocator.slabs_to_lease(model, num_blocks, copy=copy))
        index = self._indices[model]
        for _ in range(missing - slabs * size):
            index.remove([allocator.evict_block(model, copy)])
            missing -= 1
        self._empty_slabs(-(-missing // size) - allocator.empty_slabs)

    def _empty_slabs(self, count: int) -> None:
        """Evicts idle slabs, each of the model that is most over its floor then."""
        if count <= 0:
            return
        floors = self._quotas.floors
        over = [
            (name, held - floors[name], idle)
            for name, held, idle in self._allocator.held_slabs()
            if idle
        ]
        for name, slabs in most_over(over, count).items():
            self._indices[name].remove(self._allocator.evict_slabs(name, slabs))

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if what can be found is not all that is kept, or may change."""
        allocator = self._allocator
        for name, state in self._models.items():
            index, layers = self._indices[name], state.spec.num_layers
            cached = [block for block in index if not allocator.references(block)]
            assert -(-len(cached) // state.spec.replicas) * layers == allocator.cached_pages(name)
            for request in state.holders():
                final = request.findable_blocks
                assert final * state.spec.tokens_per_page <= request.num_tokens
                assert request.found_tokens <= final * state.spec.tokens_per_page
                for block in request.blocks[final:]:  # what it writes to is its own
                    assert block not in index
                    assert allocator.references(block) == 1


def most_over(over: Iterable[tuple[str, int, int]], count: int) -> dict[str, int]:
    """Takes slabs one by one, each from the model that is most over its floor then; of several the
    first.

    Args:
      over: of each model its name, by how much it is over its floor, and how many it can give.
      count: how many, not more than all can give together.

    Returns:
      How many of whom.
    """
    heap = [(-above, at, idle, name) for at, (name, above, idle) in enumerate(over)]
    heapify(heap)
    taken: dict[str, int] = {}
    while count > 0:
        rank, at, idle, name = heap[0]
        # As many at once as there are until another one comes before it.
        next_rank, next_at = min(heap[1:3], default=(rank + idle, at))[:2]
        some = min(count, idle, next_rank - rank + (at < next_at))
        taken[name] = taken.get(name, 0) + some
        count -= some
        if idle > some:
            heapreplace(heap, (rank + some, at, idle - some, name))
        else:
            heappop(heap)
    return taken


def _findable(request: Request) -> int:
    """Tokens of a waiting request's prefix that need not be computed."""
    params = request.params
    if params.prompt_logprobs is not None or params.repetition_penalty != 1.0:
        return 0
    last = request.num_tokens - 1
    return min(last, len(request.prompt)) if params.penalized else last
