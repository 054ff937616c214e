"""The files that a checkpoint is read from, and whether they have changed since it was opened.

A checkpoint's header is read when a fleet starts, and its weights when the model is loaded, which
may be days later for a model that starts asleep. By then the files can be deleted or belong to
another model. Reading them with the old header would give wrong weights, and reading a mapped file
that became shorter ends the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from muxjax.errors import CheckpointError

_State = tuple[int, int, int, int]


@dataclass(frozen=True)
class SourceFiles:
    """Files and their state when they were opened.

    Attributes:
      states: device, inode, size in bytes, and time of the last change in nanoseconds, by path.
    """

    states: Mapping[Path, _State] = field(default_factory=dict)

    @classmethod
    def record(cls, paths: Iterable[Path]) -> Self:
        """The present state of these files.

        Raises:
          CheckpointError: a file is missing.
        """
        states = {}
        for path in paths:
            state = _read_state(path)
            if isinstance(state, str):
                raise CheckpointError(f"{path}: cannot be read: {state}")
            states[path] = state
        return cls(states)

    def check_unchanged(self) -> None:
        """Checks that all files are still the ones that were opened.

        Raises:
          CheckpointError: a file was deleted, changed or replaced.
        """
        for path, before in self.states.items():
            now = _read_state(path)
            if isinstance(now, str):
                raise CheckpointError(
                    f"{path}: {now}; the file was present when the model was opened: "
                    "restore it and load the model again"
                )
            if now != before:
                raise CheckpointError(
                    f"{path}: changed since the model was opened: load the model again"
                )


def _read_state(path: Path) -> _State | str:
    """The state of a file, or the reason why it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        return error.strerror or type(error).__name__
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
