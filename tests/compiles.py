"""Counts compilations by XLA, to show that nothing is compiled after warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def counted_compiles() -> Iterator[list[float]]:
    """Yields a list of the seconds of each compilation in the block, including cached ones."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == _EVENT:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
