"""Descriptions of devices that are not present."""

import subprocess
import sys


def test_error_names_the_missing_compiler():
    program = """
import sys
sys.modules["libtpu"] = None
from muxjax.compile_check.targets import TargetUnavailable, set_environment
set_environment("v5e:2x2")
from muxjax.compile_check.devices import describe_devices
try:
    describe_devices("v9x:2x2")
except TargetUnavailable as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    assert "cannot compile for v9x:2x2" in done.stdout
    assert "pip install 'muxjax[tpu]'" in done.stdout
