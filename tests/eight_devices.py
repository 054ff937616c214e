"""Runs test functions in a process that sees one CPU as eight devices.

XLA decides how many devices a CPU is when JAX starts, so that a test cannot choose it for itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
_RUN = """
import importlib, sys
getattr(importlib.import_module(sys.argv[1]), sys.argv[2])()
"""


def run(module: str, function: str) -> str:
    """Calls a function without arguments; returns what it printed, fails with what it raised."""
    # Compiling is most of the time: what is compiled runs for milliseconds.
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", _RUN, module, function],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout
