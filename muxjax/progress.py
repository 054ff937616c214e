"""Progress bars of long work, on standard error and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Bars:
    """Bars over known amounts of work; safe to advance from several threads.

    Args:
      totals: amount of each kind of work by its title.
      show: False shows nothing, terminal or not.
    """

    def __init__(self, totals: Mapping[str, int], *, show: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[last]}"),
            console=Console(stderr=True),
            disable=not show or not sys.stderr.isatty(),
        )
        self._tasks = {
            title: self._progress.add_task(title, total=total, last="")
            for title, total in totals.items()
        }

    def advance(self, title: str, amount: int, last: str) -> None:
        """Notes that some work is done; `last` says what."""
        self._progress.update(self._tasks[title], advance=amount, last=last)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for task in self._tasks.values():
            self._progress.update(task, last="")
        self._progress.stop()
