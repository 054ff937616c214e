"""Commands in a process with limits that stand for a full disk or a read-only folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import ctypes, os, resource, sys
file_bytes = int(sys.argv[1])
if file_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
if os.getuid() == 0:  # so that the modes of folders apply to the superuser too
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
ROOT = Path(__file__).parents[1]


def limited(*arguments: str, file_bytes: int = 0) -> list[str]:
    """The command that runs Python with these arguments, under limits.

    Writing to folders without write permission fails, for the superuser too.

    Args:
      arguments: of Python.
      file_bytes: writes past this size of a file fail, as on a full disk; 0: no limit.
    """
    return [sys.executable, "-c", _PROGRAM, str(file_bytes), *arguments]


def run_muxjax(
    *arguments: object, file_bytes: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command line under the limits of `limited`."""
    return subprocess.run(
        limited("-m", "muxjax", *map(str, arguments), file_bytes=file_bytes),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
