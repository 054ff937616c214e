"""Removes unfinished folders when a command is asked to stop."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_TRIES = 50
_PAUSE = 0.02
"""Seconds between removing a folder and checking that it is gone."""
_unfinished: set[Path] = set()


@contextmanager
def unfinished_folder(folder: Path) -> Iterator[None]:
    """Removes a folder when a block ends, also by a signal in `exit_on_signals`."""
    _unfinished.add(folder)
    try:
        yield
    finally:
        _remove(folder)
        _unfinished.discard(folder)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGINT remove the unfinished folders and end the process at once.

    An exception in the handler would not do: Python drops it if the signal arrives in a callback of
    the garbage collector. Only in the main thread.
    """

    def leave(number: int, frame: object) -> None:
        for folder in _unfinished:
            _remove(folder)
        os._exit(128 + number)

    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, leave))
        yield


def _remove(folder: Path) -> None:
    """Removes a folder to which other threads may still write."""
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_PAUSE)  # a writer may create it again
        if not folder.exists():
            return
