"""What a step is made of: which prompts or sequences of a model, with which pages."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from muxjax.scheduling.in_flight_steps import InFlightSteps
from muxjax.scheduling.kv_cache.manager import KVCacheManager
from muxjax.scheduling.kv_cache.prefix_cache import PrefixCache
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request
from muxjax.scheduling.steps import Decode, DecodeBatch, Prefill, PrefillChunk


class BatchBuilder:
    """Makes the steps of one unit.

    Args:
      models: of the unit.
      flights: steps made and not applied.
      residency: who gives pages.
      prefixes: told what is written.

    Attributes:
      requests: who is in the step that was made last, in its order.
    """

    def __init__(
        self,
        models: Mapping[str, ModelState],
        flights: InFlightSteps,
        residency: KVCacheManager,
        prefixes: PrefixCache,
    ) -> None:
        self._models = models
        self._flights = flights
        self._residency = residency
        self._prefixes = prefixes
        self.requests: list[Request] = []

    def prefill(self, model: str, max_tokens: int | None) -> Prefill | None:
        """See `Unit.make_prefill`."""
        state = self._models[model]
        limits = state.spec.limits
        budget = limits.max_prefill_tokens
        if max_tokens is not None:
            budget = min(budget, max(1, max_tokens))
        chunks: list[PrefillChunk] = []
        self.requests = []
        for request in list(state.prefilling.values()):
            if budget == 0 or len(chunks) == limits.max_prefill_seqs:
                break
            chunks.append(self._next_chunk(state, request, budget))
            budget -= len(chunks[-1].tokens)
        while budget > 0 and len(chunks) < limits.max_prefill_seqs:
            admitted = self._residency.admit(state)
            if admitted is None:
                break
            chunks.append(self._next_chunk(state, admitted, budget))
            budget -= len(chunks[-1].tokens)
        if not chunks:
            return None
        for request in self.requests:
            self._prefixes.note_written(request)
        return Prefill(model, chunks)

    def decode(self, model: str, max_tokens: int | None) -> Decode | None:
        """See `Unit.make_decode`."""
        state, flights = self._models[model], self._flights
        most = state.spec.limits.max_decode_tokens
        if max_tokens is not None:
            most = min(most, max(1, max_tokens))
        table = state.table
        left: np.ndarray = table.limit - table.made
        constrained = bool(table.constrained.any())
        if constrained:
            most = 1
        if flights and (flights.concurrent or constrained):
            busy = flights.work_on(table.last_step)
            left[busy if flights.concurrent else busy & table.constrained] = 0
        slots = left.nonzero()[0]
        if not slots.size:
            return None
        slots, counts, blocks = self._residency.grow(state, slots, min(most, int(left.max())))
        if not slots.size:
            return None
        table.made[slots] += counts
        table.last_step[slots] = flights.made + 1
        self.requests = requests = table.requests[slots].tolist()
        masks = [_mask(request) for request in requests] if constrained else None
        batch = DecodeBatch(
            table.ids[slots], slots, table.blocks[slots].tolist(), blocks, counts, masks
        )
        return Decode(model, batch, int(counts.max()))

    def _next_chunk(self, state: ModelState, request: Request, budget: int) -> PrefillChunk:
        start = request.dispatched
        end = min(request.prefix_tokens, start + budget)
        last = end == request.prefix_tokens
        request.dispatch(end, self._flights.made + 1)
        self.requests.append(request)
        if last:
            state.start_decode(request)
        following: tuple[int, ...] = ()
        wanted = request.params.prompt_logprobs
        if wanted is not None and len(request.prompt_logprobs) < len(request.prompt) - 1:
            following = tuple(request.prompt[start + 1 : end + 1])
        return PrefillChunk(
            request_id=request.id,
            slot=request.slot,
            tokens=request.tokens_between(start, end),
            start=start,
            num_prompt_tokens=len(request.prompt),
            blocks=request.blocks,
            num_blocks=state.spec.blocks_for(end),
            sampling=request.params if last else None,
            max_new_tokens=request.max_new_tokens,
            stop_ids=request.stop_ids,
            mask=_mask(request) if last else None,
            following=following,
            prompt_logprobs=wanted or 0,
            found=request.found_tokens,
        )


def _mask(request: Request) -> np.ndarray | None:
    return None if request.constraint is None else request.constraint.mask
