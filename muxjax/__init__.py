"""MuxJAX: many language models of uneven popularity on one set of accelerators.

One process, one KV array, and a scheduler that alternates the compiled prefill and decode steps of
all models by computed quotas (after MuxServe, Duan et al., ICML 2024).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from muxjax._version import __version__

if TYPE_CHECKING:
    from muxjax.fleet import Completion, Delta, Fleet, Stream
    from muxjax.sampling_params import SamplingParams

_LAZY = {
    "Completion": "muxjax.fleet",
    "Delta": "muxjax.fleet",
    "Fleet": "muxjax.fleet",
    "SamplingParams": "muxjax.sampling_params",
    "Stream": "muxjax.fleet",
}
__all__ = ["Completion", "Delta", "Fleet", "SamplingParams", "Stream", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, so that `import muxjax` alone stays cheap."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'muxjax' has no attribute {name!r}")
