"""The server with a fake fleet as a process, for tests with signals."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def serving(
    delay: float,
    drain_timeout: float = 10.0,
    tls: tuple[Path, Path] | None = None,
    stderr: int | None = None,
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs the server and yields the process and its URL when it is ready."""
    command = [sys.executable, "-m", "tests.serve.serve_fake", str(delay), str(drain_timeout)]
    command += [str(path) for path in tls or ()]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith("serving chat, plain/base, ids on http")
            yield process, line.split()[-1]
        finally:
            process.kill()
