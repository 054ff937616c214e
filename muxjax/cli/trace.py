"""`--trace FILE` of several commands: records who ran when, and writes it however the run ends."""

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
def recorded(path: Path | None) -> Iterator[Timeline | None]:
    """A timeline that is written at the end, after an error or Ctrl-C too; None without a path.

    Raises:
      BenchError: the file cannot be written; found out before the run.
    """
    if path is None:
        yield None
        return
    from muxjax.scheduling.timeline import Timeline

    if path.is_dir() or not path.parent.is_dir():
        raise BenchError(f"--trace {path}: not a file in a folder that exists")
    timeline = Timeline()
    try:
        yield timeline
    finally:
        try:
            timeline.write(path)
        except OSError as error:
            raise BenchError(f"{path}: cannot be written: {error.strerror or error}") from error
        gone = f"; the {timeline.dropped} before them are gone" if timeline.dropped else ""
        print(f"muxjax: trace of {len(timeline)} steps in {path}{gone}", file=sys.stderr)
