"""Freed memory is kept, so that what is allocated next brings no page faults."""

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_a_block_that_was_freed_is_taken_again() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    pages = (24 << 20) // 4096
    assert int(ended.stdout) < 2 * pages, "ten blocks bring as many faults as two at most"


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from muxjax.executor import host_memory

    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    assert not host_memory.keep_freed_memory()
