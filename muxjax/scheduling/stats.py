"""Counters of a unit for `Fleet.stats` and the server: JSON values, in pages and seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from muxjax.scheduling.fair_share import FairShare
from muxjax.scheduling.fairness import jain_index
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.model_state import ModelState


def pool_stats(
    allocator: SlabAllocator, quotas: KVQuotas, models: Iterable[ModelState]
) -> dict[str, Any]:
    """Counters of the pool, recent quota moves and reclaims, and fairness.

    - `free_pages`: pages of empty slabs.
    - `cached_pages`: pages of slabs with cached blocks and none in use. Leased, free and cached
      pages add up to `usable_pages`.
    - `kv_fairness`: Jain's index of `kv_normalized_use` over the models that have requests.
    """
    busy = [state.spec.name for state in models if state.has_prefill or state.has_decode]
    uses = [quotas.normalized_use(name) for name in busy]
    fairness = jain_index([use for use in uses if math.isfinite(use)])
    return {
        "pool_pages": allocator.num_pages,
        "usable_pages": allocator.usable_pages,
        "free_pages": allocator.empty_slabs * allocator.slab_pages,
        "cached_pages": allocator.idle_slabs * allocator.slab_pages,
        "slab_pages": allocator.slab_pages,
        "slab_waste": allocator.waste,
        "quota_moves": [move.as_dict() for move in quotas.moves],
        "kv_reclaims": [reclaim.as_dict() for reclaim in quotas.reclaimed],
        "kv_fairness": 1.0 if fairness is None else fairness,
    }


def model_stats(
    state: ModelState, allocator: SlabAllocator, quotas: KVQuotas, fair_share: FairShare
) -> dict[str, Any]:
    """Counters of a model: requests, pages and device time.

    - `kv_pages_used`: pages of blocks that requests refer to; a shared block counts once.
    - `kv_pages_cached`: pages of blocks that no request refers to, kept in the prefix cache.
    - `prefix_queries`, `prefix_hits`: prompt tokens looked up in the prefix cache, and found.
    - `kv_pages_leased`, `kv_pages_quota`, `kv_pages_floor`: in pages of whole slabs.
    - `kv_pages_borrowed`: leased pages beyond the quota.
    - `kv_quota_use`: highest use since quotas last moved, as a fraction of the quota.
    - `kv_normalized_use`: the model's fraction of all leased pages over its fraction of the
      expected demand; None for a model that has pages and no expected demand.
    - `kv_pages_given_back`, `kv_pages_taken_back`: pages that it lost to other models, and gained
      from them, by preemption.
    - `prefill_share`, `decode_share`: shares of the device time.
    """
    name, pages = state.spec.name, allocator.slab_pages
    normalized = quotas.normalized_use(name)
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
        "kv_normalized_use": normalized if math.isfinite(normalized) else None,
        "prefill_seconds": fair_share.used[name, "prefill"],
        "decode_seconds": fair_share.used[name, "decode"],
        "prefill_share": fair_share.shares[name, "prefill"],
        "decode_share": fair_share.shares[name, "decode"],
    }
