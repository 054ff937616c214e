"""The scheduler, the mock executor and the demand formulas import no JAX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_scheduling_does_not_import_jax() -> None:
    program = (
        "import sys, muxjax.scheduling.scheduler, muxjax.testing.mock_executor\n"
        "import muxjax.scheduling.demand\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
