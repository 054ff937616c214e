"""SIGINT and SIGTERM: the first stops a command in order, the second ends its process at once."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SIGINT_STATUS = 128 + signal.SIGINT


def end_at_next_signal() -> None:
    """Makes the next SIGINT or SIGTERM end the process at once and without output.

    The default action needs no Python code, so it also ends a process that waits for a compiler.
    A shell reports the exit status 130 or 143.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def interrupted_by_stop_signals() -> Iterator[None]:
    """Makes the first SIGINT or SIGTERM raise KeyboardInterrupt, so that open contexts are closed.

    If that leaves the block, the process ends by the signal, without a traceback. A second signal
    ends it while it closes the contexts.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        end_at_next_signal()
        received.append(number)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        yield
    except BaseException:
        if received:
            _end_by(received[0])
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ends_by_sigint() -> Iterator[None]:
    """Ends the process by SIGINT if a KeyboardInterrupt leaves the block, as shells expect.

    The process then does not wait for its threads, and prints no traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        _end_by(signal.SIGINT)
    except SystemExit as error:  # typer's, for a KeyboardInterrupt
        if error.code == _SIGINT_STATUS:
            _end_by(signal.SIGINT)
        raise


def _end_by(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    signal.raise_signal(number)
