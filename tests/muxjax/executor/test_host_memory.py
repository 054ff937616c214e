"""Retention of freed memory by the C library."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
from muxjax.executor.host_memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 24 << 20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        block = libc.malloc(SIZE)
        ctypes.memset(block, 1, SIZE)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_freed_blocks_are_reused() -> None:
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    pages = (24 << 20) // 4096
    assert int(completed.stdout) < 2 * pages, "ten blocks cause at most the faults of two"


def test_other_systems_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    from muxjax.executor import host_memory

    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    assert not host_memory.keep_freed_memory()
