"""Runs test functions in a process in which one CPU has eight devices.

XLA sets the number of CPU devices when JAX starts, so that a running test cannot change it.
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
    """Calls a function without arguments and returns its standard output; fails if it raises."""
    # Most of the time is compilation; the compiled programs run for milliseconds.
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
    completed = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", _RUN, module, function],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert completed.returncode == 0, f"{completed.stdout[-2000:]}\n{completed.stderr[-6000:]}"
    return completed.stdout
