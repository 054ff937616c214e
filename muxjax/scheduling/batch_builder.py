"""Builds steps: chooses requests of a model and allocates their slots and pages."""

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
    """Builds the steps of one scheduler.

    Each method returns the step and the requests in it, in the step's order, or None if no step is
    possible now. The caller must submit the step: its pages are allocated and its requests moved.

    Args:
      models: state of each model, by name.
      in_flight: steps in flight.
      kv_cache: allocates slots and pages.
      prefixes: the prefix cache, which records the blocks that a prefill writes.
    """

    def __init__(
        self,
        models: Mapping[str, ModelState],
        in_flight: InFlightSteps,
        kv_cache: KVCacheManager,
        prefixes: PrefixCache,
    ) -> None:
        self._models = models
        self._in_flight = in_flight
        self._kv_cache = kv_cache
        self._prefixes = prefixes

    def build_prefill(
        self, model: str, max_tokens: int | None = None
    ) -> tuple[Prefill, list[Request]] | None:
        """Builds a prefill of a model's unfinished prefixes and as many new ones as fit.

        Args:
          model: name of the model.
          max_tokens: limit on the tokens of the step, if below that of the model's buckets.

        Returns:
          The step and its requests; None if no request waits, or slots or pages are short.
        """
        state = self._models[model]
        limits = state.spec.limits
        budget = limits.max_prefill_tokens
        if max_tokens is not None:
            budget = min(budget, max(1, max_tokens))
        chunks: list[PrefillChunk] = []
        requests: list[Request] = []
        for request in list(state.prefilling.values()):
            if budget == 0 or len(chunks) == limits.max_prefill_seqs:
                break
            chunks.append(self._build_chunk(state, request, budget))
            requests.append(request)
            budget -= len(chunks[-1].tokens)
        while budget > 0 and len(chunks) < limits.max_prefill_seqs:
            admitted = self._kv_cache.admit(state)
            if admitted is None:
                break
            chunks.append(self._build_chunk(state, admitted, budget))
            requests.append(admitted)
            budget -= len(chunks[-1].tokens)
        if not chunks:
            return None
        for request in requests:
            self._prefixes.note_written(request)
        return Prefill(model, chunks), requests

    def build_decode(
        self, model: str, max_tokens: int | None = None
    ) -> tuple[Decode, list[Request]] | None:
        """Builds a decode of all of a model's sequences that may have tokens left to generate.

        If pages are short, the step has fewer tokens. If they are short even for one token,
        requests are preempted, and a sequence that still gets no page is left out. If steps run
        concurrently, a sequence in a step in flight is left out too.

        A sequence with a grammar is left out while it is in a step in flight, whose result
        determines its mask. While a model has such a sequence, its decodes have one token, so that
        the sequence does not wait for long steps.

        Args:
          model: name of the model.
          max_tokens: limit on the tokens of each sequence, if below that of the model's buckets.

        Returns:
          The step and its requests; None if there is no such sequence.
        """
        state, in_flight = self._models[model], self._in_flight
        limit = state.spec.limits.max_decode_tokens
        if max_tokens is not None:
            limit = min(limit, max(1, max_tokens))
        table = state.table
        left: np.ndarray = table.limit - table.expected
        constrained = bool(table.constrained.any())
        if constrained:
            limit = 1
        if in_flight and (in_flight.concurrent or constrained):
            busy = in_flight.busy_slots(table.last_step)
            left[busy if in_flight.concurrent else busy & table.constrained] = 0
        slots = left.nonzero()[0]
        if not slots.size:
            return None
        slots, counts, blocks = self._kv_cache.grow(state, slots, min(limit, int(left.max())))
        if not slots.size:
            return None
        table.expected[slots] += counts
        table.last_step[slots] = in_flight.started + 1
        requests: list[Request] = table.requests[slots].tolist()
        masks = [_mask(request) for request in requests] if constrained else None
        batch = DecodeBatch(
            table.ids[slots], slots, table.blocks[slots].tolist(), blocks, counts, masks
        )
        return Decode(model, batch, int(counts.max())), requests

    def _build_chunk(self, state: ModelState, request: Request, budget: int) -> PrefillChunk:
        start = request.dispatched
        end = min(request.prefix_tokens, start + budget)
        last = end == request.prefix_tokens
        request.dispatch(end, self._in_flight.started + 1)
        if last:
            state.start_decode(request)
        following: tuple[int, ...] = ()
        num_logprobs = request.params.prompt_logprobs
        if num_logprobs is not None and len(request.prompt_logprobs) < len(request.prompt) - 1:
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
            prompt_logprobs=num_logprobs or 0,
            found=request.found_tokens,
        )


def _mask(request: Request) -> np.ndarray | None:
    return None if request.constraint is None else request.constraint.mask
