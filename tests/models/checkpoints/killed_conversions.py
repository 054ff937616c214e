"""Converts a checkpoint many times, and kills the conversions at random moments.

Usage: killed_conversions.py SOURCE FOLDER COUNT. Writes FOLDER/0, FOLDER/1, ..., or a part of them.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

from muxjax.models.checkpoints.convert import convert
from muxjax.models.checkpoints.loading import open_checkpoint


def convert_in_child(source: Path, dest: Path, kill_after: float | None) -> float:
    """Converts in a forked process, killed after some seconds; returns the seconds that it ran."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            convert(open_checkpoint(source), dest)
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.monotonic() - began


def main() -> None:
    source, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    moments = random.Random(0)
    seconds = convert_in_child(source, folder / "whole", None)
    for index in range(count):
        convert_in_child(source, folder / str(index), moments.uniform(0.0, seconds))


warnings.simplefilter("ignore", RuntimeWarning)  # JAX warns of forks; its backend is not started
main()
