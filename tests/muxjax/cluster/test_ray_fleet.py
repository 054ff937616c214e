"""Units as Ray actors, on one machine with two simulated nodes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.eight_devices import ROOT

SECONDS = 300


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs muxjax[ray]")
def test_streams_are_complete_and_unchanged_after_the_loss_of_a_process_or_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    completed = subprocess.run(
        [sys.executable, "-m", "tests.muxjax.cluster.on_ray"],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # Restarted processes compile again, so compilation must be fast.
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert completed.returncode == 0, f"{completed.stdout[-2000:]}\n{completed.stderr[-6000:]}"
    report = json.loads(completed.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\nRay: {json.dumps(report)}")
    assert report["devices"] == {"wide": 2, "left": 1, "right": 1}
    assert report["on separate nodes"]
    assert report["moved"]
    for failure in (report["process"], report["node"]):
        assert failure["failed"] == failure["incomplete"] == 0
        assert failure["same"]
        assert failure["tokens before"] < failure["tokens"]
    assert report["running requests"] == 0
    restarts = dict(report["restarts"])
    assert restarts.pop("left") >= 1
    assert sum(restarts.values()) >= 1


def test_without_ray_the_error_names_the_extra():
    program = (
        "import sys; sys.modules['ray'] = None; sys.argv[1:] = sys.argv[1:]\n"
        "from muxjax.cli.main import main; main()"
    )
    fleet = ROOT / "examples" / "demo.yaml"
    completed = subprocess.run(
        [sys.executable, "-c", program, "serve", fleet, "--ray", "local", "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert completed.returncode == 2
    assert re.search(r"Ray is not installed: pip install 'muxjax\[ray\]'", completed.stderr)


def test_ray_is_not_imported_without_its_option():
    program = "import sys, muxjax.fleet, muxjax.cli.serve; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=True)
