"""Units as Ray's actors, on one machine that plays two."""

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
def test_no_stream_is_lost_or_changed_when_a_process_or_a_node_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    done = subprocess.run(
        [sys.executable, "-m", "tests.muxjax.cluster.on_ray"],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # Compiling is most of the time, and processes that are started anew do it again.
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
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\nRay: {json.dumps(found)}")
    assert found["devices"] == {"wide": 2, "left": 1, "right": 1}
    assert found["apart"]
    assert found["moved"]
    for blow in (found["process"], found["node"]):
        assert blow["failed"] == blow["cut short"] == 0
        assert blow["same"]
        assert blow["made before"] < blow["of"]
    assert found["left over"] == 0
    restarts = dict(found["restarts"])
    assert restarts.pop("left") >= 1
    assert sum(restarts.values()) >= 1


def test_without_ray_the_error_names_the_extra():
    program = (
        "import sys; sys.modules['ray'] = None; sys.argv[1:] = sys.argv[1:]\n"
        "from muxjax.cli.main import main; main()"
    )
    fleet = ROOT / "examples" / "demo.yaml"
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", fleet, "--ray", "local", "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(r"Ray is not installed: pip install 'muxjax\[ray\]'", done.stderr)


def test_nothing_of_ray_is_imported_without_the_flag():
    program = "import sys, muxjax.fleet, muxjax.cli.serve; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=True)
