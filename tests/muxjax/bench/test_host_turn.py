from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# The fake programs fail the run-time type checks of the test suite, so this runs in a process
# without these checks.
SCRIPT = """
import json
from muxjax.bench.host_turn import time_turns
print(json.dumps([time_turns(4, burst, 5e-4) for burst in (1, 8)]))
"""


def test_turns_are_timed_by_part() -> None:
    root = Path(__file__).parents[3]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    for times in json.loads(process.stdout):
        assert times["median_us"] > 0
        assert {f"{part}_us" for part in ("next_step", "submit", "result", "apply")} <= set(times)
