"""Runs `muxjax bench` in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.muxjax.cli.harness import run_cli
from tests.muxjax.conftest import TINY_FLEET


class BenchCli:
    """The command line, and a folder with the fleet file of the tiny models.

    Attributes:
      folder: for the files of a test.
      fleet: the fleet file.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.fleet = folder / "fleet.yaml"
        self.fleet.write_text(yaml.safe_dump(TINY_FLEET))

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Returns exit status, standard output and standard error of `muxjax ARGUMENTS`."""
        return run_cli(self._monkeypatch, self._capsys, *arguments)

    def succeed(self, *arguments: object) -> str:
        """Returns the output of a command that must succeed."""
        status, out, err = self(*arguments)
        assert status == 0, err
        return out

    def fail(self, *arguments: object) -> str:
        """Returns the error of a command that must fail, on one line."""
        status, _, err = self(*arguments)
        assert status == 2
        return " ".join(err.split())
