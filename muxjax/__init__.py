"""MuxJAX: many language models of uneven popularity on one set of accelerators.

One process, one KV cache pool, and a scheduler that interleaves the compiled prefill and decode
steps of all models by quotas (after MuxServe, Duan et al., ICML 2024).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from muxjax import errors
from muxjax._version import __version__

if TYPE_CHECKING:
    from muxjax.engine.health import ModelHealth, UnitHealth
    from muxjax.engine.stream import Stream
    from muxjax.fleet import Fleet
    from muxjax.grammar import Grammar
    from muxjax.model_handle import ModelHandle
    from muxjax.outputs import (
        Completion,
        Delta,
        FleetStats,
        FunctionCall,
        ModelStats,
        TokenLogprobs,
        UnitStats,
    )
    from muxjax.sampling_params import SamplingParams
    from muxjax.scheduling.policies.registry import register_policy

_LAZY = {
    "Completion": "muxjax.outputs",
    "Delta": "muxjax.outputs",
    "Fleet": "muxjax.fleet",
    "FleetStats": "muxjax.outputs",
    "FunctionCall": "muxjax.outputs",
    "Grammar": "muxjax.grammar",
    "ModelHandle": "muxjax.model_handle",
    "ModelHealth": "muxjax.engine.health",
    "ModelStats": "muxjax.outputs",
    "SamplingParams": "muxjax.sampling_params",
    "Stream": "muxjax.engine.stream",
    "TokenLogprobs": "muxjax.outputs",
    "UnitHealth": "muxjax.engine.health",
    "UnitStats": "muxjax.outputs",
    "register_policy": "muxjax.scheduling.policies.registry",
}
__all__ = [
    "Completion",
    "Delta",
    "Fleet",
    "FleetStats",
    "FunctionCall",
    "Grammar",
    "ModelHandle",
    "ModelHealth",
    "ModelStats",
    "SamplingParams",
    "Stream",
    "TokenLogprobs",
    "UnitHealth",
    "UnitStats",
    "__version__",
    "errors",
    "register_policy",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `import muxjax` is fast."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'muxjax' has no attribute {name!r}")
