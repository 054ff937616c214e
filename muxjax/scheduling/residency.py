"""Who holds pages and slots: admission, growth, preemption, release.

A request is admitted when there are pages for its whole prefix and a first decode burst, and for a
burst of those of its model that run already, who would else soon preempt it. Running sequences grow
by blocks; where pages are short, `preemption.py` says who must give.

While the first in line of some model waits for pages, younger requests of other models may not keep
taking what comes free: admitting them must leave their model within its quota, or within its floor
if the older one needs more than the quota of its own model. Running requests end, so that the older
one gets its turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from muxjax.scheduling.allocator import SlabAllocator
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.preemption import plan_preemption
from muxjax.scheduling.quotas import KVQuotas
from muxjax.scheduling.requests import Request, RequestState
from muxjax.scheduling.specs import ModelSpec

Live: TypeAlias = tuple[Request, int, int]
"""A running sequence, how many tokens it may still make, and how many it has in the pool once all
steps in flight have run."""


class Residency:
    """Gives pages and slots to requests and takes them back, within quotas.

    Args:
      models: state of each model; requests move between its groups here.
      allocator: the pool.
      quotas: floors and quotas.
    """

    def __init__(
        self, models: Mapping[str, ModelState], allocator: SlabAllocator, quotas: KVQuotas
    ) -> None:
        self._models = models
        self._allocator = allocator
        self._quotas = quotas
        self._refused: dict[str, Request] = {}

    def admit(self, state: ModelState) -> Request | None:
        """Moves the first waiting request to those being prefilled, if there is room for it."""
        request = next(iter(state.waiting.values()), None)
        if request is None or request.steps_in_flight or not state.free_slots:
            return None
        spec = state.spec
        blocks = _blocks_to_admit(spec, request)
        headroom = spec.blocks_for(spec.limits.max_decode_tokens * len(state.running))
        if not self._may_admit(state, request, blocks + headroom):
            self._refused[spec.name] = request
            return None
        self.forget(request)
        state.remove(request)
        request.blocks = self._allocate(spec.name, blocks)
        request.slot = state.free_slots.pop()
        request.prefix_tokens = request.num_tokens
        request.dispatched = 0
        state.start_prefill(request)
        return request

    def grow(self, state: ModelState, live: list[Live], num_tokens: int) -> tuple[list[Live], int]:
        """Gives running sequences the blocks for their next tokens.

        If pages are short, for fewer tokens; if they are short for one token, others are preempted.

        Args:
          state: their model.
          live: the sequences, oldest first.
          num_tokens: how many are wanted for each.

        Returns:
          The sequences that have their blocks, and for how many tokens.
        """
        while not self._grow_all(state, live, num_tokens):
            if num_tokens == 1:
                return self._grow_each(state, live), 1
            num_tokens //= 2
        return live, num_tokens

    def release(self, request: Request) -> None:
        """Takes a request out of its model's groups, with its pages and slot if it has any."""
        state = self._models[request.model]
        state.remove(request)
        if request.state is RequestState.WAITING:
            self.forget(request)
            return
        self._allocator.free(request.model, request.blocks)
        request.blocks = []
        state.free_slots.append(request.slot)
        request.slot = -1

    def forget(self, request: Request) -> None:
        """Drops the record that the request was refused pages, if there is one."""
        if self._refused.get(request.model) is request:
            del self._refused[request.model]

    # Admission

    def _may_admit(self, state: ModelState, request: Request, blocks: int) -> bool:
        name = state.spec.name
        slabs = self._allocator.slabs_to_lease(name, blocks)
        if not slabs:
            return True
        leased = self._allocator.leased_slabs(name)
        if slabs <= min(self._quotas.leasable(name), self._reserved_limit(request) - leased):
            return True
        if leased + slabs <= self._quotas.floors[name]:
            return self._preempt_for(name, slabs, None)
        self._quotas.note_refused(name, slabs)
        return False

    def _reserved_limit(self, request: Request) -> int:
        """Most slabs that the request's model may come to by admitting it."""
        quotas = self._quotas.quotas
        limit = self._allocator.num_slabs
        for name, older in self._refused.items():
            if name == request.model or older.order > request.order:
                continue
            blocks = _blocks_to_admit(self._models[name].spec, older)
            if self._allocator.slabs_for(name, blocks) > quotas[name]:
                return self._quotas.floors[request.model]
            limit = quotas[request.model]
        return limit

    # Growth

    def _grow_all(self, state: ModelState, live: list[Live], num_tokens: int) -> bool:
        """Gives all sequences the blocks for so many tokens, or none of them any."""
        per_block = state.spec.tokens_per_page
        short: list[tuple[Request, int]] = []
        total = 0
        for request, left, held in live:
            tokens = held + (left if left < num_tokens else num_tokens)
            missing = tokens - per_block * len(request.blocks)
            if missing > 0:
                blocks = -(-missing // per_block)
                short.append((request, blocks))
                total += blocks
        if not total:
            return True
        name = state.spec.name
        slabs = self._allocator.slabs_to_lease(name, total)
        if slabs and slabs > self._quotas.leasable(name):
            return False
        new = self._allocate(name, total)
        for request, blocks in short:
            request.blocks.extend(new[-blocks:])
            del new[-blocks:]
        return True

    def _grow_each(self, state: ModelState, live: list[Live]) -> list[Live]:
        """Gives sequences the blocks for one token more, oldest first, preempting where it must."""
        grown: list[Live] = []
        for request, left, held in live:
            if request.state is not RequestState.RUNNING:
                continue  # preempted for an older one
            one = [(request, left, held)]
            if self._grow_all(state, one, 1) or (
                self._preempt_for(state.spec.name, 1, request) and self._grow_all(state, one, 1)
            ):
                grown += one
        return grown

    # Preemption

    def _preempt_for(self, name: str, slabs: int, requester: Request | None) -> bool:
        """Preempts others so that a model can lease slabs, or its requester get a block."""
        holders = {other: state.holders() for other, state in self._models.items()}
        victims = plan_preemption(self._allocator, self._quotas, holders, name, slabs, requester)
        if victims is None:
            return False
        for victim in victims:
            state = self._models[victim.model]
            self.release(victim)
            victim.preemptions += 1
            state.preemptions += 1
            state.requeue(victim)
        return True

    def _allocate(self, name: str, num_blocks: int) -> list[int]:
        blocks = self._allocator.allocate(name, num_blocks)
        if blocks is None:  # the quotas, which were asked, never promise more than is free
            raise AssertionError(f"{name} was promised {num_blocks} blocks that are not there")
        self._quotas.note_leased(name)
        return blocks

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if blocks and what the requests hold do not agree."""
        for name, state in self._models.items():
            blocks = [block for request in state.holders() for block in request.blocks]
            assert len(set(blocks)) == len(blocks)
            assert len(blocks) * state.spec.num_layers == self._allocator.used_pages(name)
        for name, request in self._refused.items():
            assert self._models[name].waiting.get(request.id) is request


def _blocks_to_admit(spec: ModelSpec, request: Request) -> int:
    """Blocks for all tokens that a waiting request has, and for its first decode burst."""
    left = request.max_new_tokens - len(request.output) - 1
    return spec.blocks_for(request.num_tokens + min(left, spec.limits.max_decode_tokens))
