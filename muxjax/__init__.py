"""MuxJAX: many language models of uneven popularity on one set of accelerators.

One process, one KV array, and a scheduler that alternates the compiled prefill and decode steps of
all models by computed quotas (after MuxServe, Duan et al., ICML 2024).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the sub-packages `models`, `serve`, ... are folders beside this one, not inside it.
# An installed package has them inside; Python started in a checkout would otherwise find this
# folder first and no `muxjax.models` under it.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pallas_kernels" / "layout.py").is_file() and str(_ROOT) not in __path__:
    __path__.append(str(_ROOT))

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
