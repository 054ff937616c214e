"""A copy of the checkout in which the commands of the pages run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.docs.pages import ROOT

# curl fails for HTTP errors, so that a command that is refused is not mistaken for one that works.
_CURL = '#!/bin/sh\nexec "{curl}" --fail-with-body --silent --show-error "$@"\n'
_MUXJAX = '#!/bin/sh\nexec "{python}" -m muxjax "$@"\n'


@dataclass(frozen=True)
class Completed:
    """A finished command: exit status (None if it was stopped), standard output and error."""

    status: int | None
    out: str
    err: str


class Workspace:
    """A copy of the checkout's files, and the environment of the commands.

    `muxjax` and `python` are those of the running Python, with the copy's modules. Port 8000 of the
    pages is replaced by a free one, and 0.0.0.0 by the loopback address.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "muxjax"
        self.port = _free_port()
        _copy_checkout(self.root)
        tools = folder / "bin"
        tools.mkdir()
        scripts = {"muxjax": _MUXJAX, "python": '#!/bin/sh\nexec "{python}" "$@"\n'}
        curl = shutil.which("curl")
        if curl is not None:
            scripts["curl"] = _CURL
        for name, script in scripts.items():
            path = tools / name
            path.write_text(script.format(python=sys.executable, curl=curl))
            path.chmod(0o755)
        (self.root / ".venv").symlink_to(sys.prefix)
        self.environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "COLUMNS": "80",
            "NO_COLOR": "1",
        }

    def start(self, script: str, log: Path) -> subprocess.Popen[str]:
        """Starts a script that serves, in a process group whose output goes to a file."""
        with log.open("w") as stream:
            return subprocess.Popen(
                ["bash", "-ec", self.localized(script)],
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def run(self, script: str, timeout: float) -> Completed:
        """Runs a script with bash; stops it and its children after `timeout` seconds."""
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", self.localized(script)],
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
            return Completed(process.returncode, out, err)
        except subprocess.TimeoutExpired:
            kill_group(process)
            out, err = process.communicate()
            return Completed(None, out, err)
        finally:
            kill_group(process)

    def localized(self, script: str) -> str:
        """The script with this run's port, on the loopback interface."""
        script = script.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        return script.replace("--host 0.0.0.0", "--host 127.0.0.1")


def kill_group(process: subprocess.Popen[str]) -> None:
    """Ends what is left of a command's process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _copy_checkout(target: Path) -> None:
    """Copies the files that git tracks or would track; other files do not exist in a clone."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, copy = ROOT / name, target / name
        if not source.exists():
            continue  # deleted, but not yet in git
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy, follow_symlinks=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
