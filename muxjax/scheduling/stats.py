"""The counters of a unit, as `Fleet.stats` and the server show them: JSON, pages and seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from muxjax.scheduling.fair_share import FairShare
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.quota_records import jain_index
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.model_state import ModelState


def pool_stats(
    allocator: SlabAllocator, quotas: KVQuotas, models: Iterable[ModelState]
) -> dict[str, Any]:
    """The pool, what of it moved lately and why, and how evenly it is used.

    `free_pages` are those of slabs that hold nothing, `cached_pages` those of slabs with nothing in
    use and something cached; with the leased ones they are `usable_pages`. `kv_fairness` is Jain's
    index of the normalised use of the models that hold pages or wait for them.
    """
    busy = [state.spec.name for state in models if state.has_prefill or state.has_decode]
    uses = [quotas.normalized_use(name) for name in busy]
    return {
        "pool_pages": allocator.num_pages,
        "usable_pages": allocator.usable_pages,
        "free_pages": allocator.empty_slabs * allocator.slab_pages,
        "cached_pages": allocator.idle_slabs * allocator.slab_pages,
        "slab_pages": allocator.slab_pages,
        "slab_waste": allocator.waste,
        "quota_moves": [move.as_dict() for move in quotas.moves],
        "kv_reclaims": [reclaim.as_dict() for reclaim in quotas.reclaimed],
        "kv_fairness": jain_index([use for use in uses if math.isfinite(use)]),
    }


def model_stats(
    state: ModelState, allocator: SlabAllocator, quotas: KVQuotas, time: FairShare
) -> dict[str, Any]:
    """One model's requests, pages and time; pages of quotas are those of leased slabs.

    - `kv_pages_used`, `kv_pages_cached`: in blocks that requests refer to, and in blocks that are
      kept to be found again; those of a shared block count once.
    - `prefix_queries`, `prefix_hits`: prompt tokens that were looked for in the prefix cache, and
      found.
    - `kv_pages_borrowed`: held beyond the quota.
    - `kv_quota_use`: the part of its quota that it held at most since quotas last moved.
    - `kv_normalised_use`: its part of all leased pages over its part of the expected need; None for
      pages of a model without any need.
    - `kv_pages_given_back`, `kv_pages_taken_back`: lost to others, and got from others, by
      preemption.
    """
    name, pages = state.spec.name, allocator.slab_pages
    normalised = quotas.normalized_use(name)
    return {
        "waiting": len(state.waiting) + len(state.deferred),
        "running": len(state.prefilling) + len(state.running),
        "finished": state.finished,
        "preemptions": state.preemptions,
        "prompt_tokens": state.prompt_tokens,
        "output_tokens": state.output_tokens,
        "prefix_queries": state.prefix_queries,
        "prefix_hits": state.prefix_hits,
        "kv_pages_used": allocator.used_pages(name),
        "kv_pages_cached": allocator.cached_pages(name),
        "kv_pages_leased": allocator.leased_pages(name),
        "kv_pages_quota": quotas.quotas[name] * pages,
        "kv_pages_floor": quotas.floors[name] * pages,
        "kv_pages_borrowed": max(0, quotas.over_quota(name)) * pages,
        "kv_pages_given_back": quotas.pages_lost[name],
        "kv_pages_taken_back": quotas.pages_gained[name],
        "kv_quota_use": quotas.peak_use(name),
        "kv_normalised_use": normalised if math.isfinite(normalised) else None,
        "prefill_seconds": time.used[name, "prefill"],
        "decode_seconds": time.used[name, "decode"],
        "prefill_share": time.shares[name, "prefill"],
        "decode_share": time.shares[name, "decode"],
    }
