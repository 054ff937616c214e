import os
import subprocess
import sys

import pytest

from muxjax.compile_check.devices import TargetUnavailable, set_environment


@pytest.mark.parametrize(
    ("target", "platforms"), [("v5e:2x2", "cpu"), ("tpu7x:2x2x1", "cpu"), ("h200", "cpu,cuda")]
)
def test_the_environment_is_set_for_a_compiler_without_a_device(monkeypatch, target, platforms):
    monkeypatch.setattr(os, "environ", {})
    set_environment(target)
    assert os.environ["JAX_PLATFORMS"] == platforms
    assert ("TPU_SKIP_MDS_QUERY" in os.environ) == (":" in target)


@pytest.mark.parametrize("target", ["", "v5e", "h100:2x2", "v5e:2", "b3000"])
def test_unknown_targets_are_refused(target):
    with pytest.raises(TargetUnavailable, match="no target"):
        set_environment(target)


def test_a_compiler_that_is_not_installed_is_asked_for():
    program = """
import sys
sys.modules["libtpu"] = None
from muxjax.compile_check.devices import describe, set_environment, TargetUnavailable
set_environment("v5e:2x2")
try:
    describe("v9x:2x2")
except TargetUnavailable as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    assert "cannot compile for v9x:2x2" in done.stdout
    assert "pip install 'muxjax[tpu]'" in done.stdout
