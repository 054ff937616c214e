"""Counting what XLA compiles, to show that nothing is compiled after warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def counted_compiles() -> Iterator[list[float]]:
    """A list that gets the seconds of every compilation inside the block, cached ones included."""
    found: list[float] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == _EVENT:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
