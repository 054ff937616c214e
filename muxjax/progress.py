"""Progress bars on standard error, if that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Bars:
    """Progress bars over known amounts of work; may be advanced from several threads.

    Args:
      totals: amount of work by title of the bar.
      show: False shows nothing, even on a terminal.
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
        """Adds `amount` to a bar, and shows `last`, such as the completed item, beside it."""
        self._progress.update(self._tasks[title], advance=amount, last=last)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for task in self._tasks.values():
            self._progress.update(task, last="")
        self._progress.stop()
