"""`--trace FILE`: records executed steps and writes them, even after an error or Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from muxjax.errors import BenchError

if TYPE_CHECKING:
    from muxjax.scheduling.timeline import Timeline


@contextmanager
def recorded_timeline(path: Path | None) -> Iterator[Timeline | None]:
    """Yields a timeline and writes it at the end, even after an error; yields None without a path.

    Raises:
      BenchError: the file cannot be written; its folder is checked before the run.
    """
    if path is None:
        yield None
        return
    from muxjax.scheduling.timeline import Timeline

    if path.is_dir() or not path.parent.is_dir():
        raise BenchError(f"--trace {path}: must be a file in a folder that exists")
    timeline = Timeline()
    try:
        yield timeline
    finally:
        try:
            timeline.write(path)
        except OSError as error:
            raise BenchError(f"{path}: cannot be written: {error.strerror or error}") from error
        dropped = f"; {timeline.dropped} earlier steps were dropped" if timeline.dropped else ""
        print(f"muxjax: trace of {len(timeline)} steps in {path}{dropped}", file=sys.stderr)
