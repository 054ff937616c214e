"""The machine and the software versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from typing import Any

from muxjax._version import __version__


def describe_machine() -> dict[str, Any]:
    """Versions, time, devices and cores, stored with every result."""
    import jax

    return {
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": str(jax.devices()[0].device_kind),
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
