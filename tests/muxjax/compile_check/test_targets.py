import os

import pytest

from muxjax.compile_check.targets import TargetUnavailable, set_environment


@pytest.mark.parametrize(
    ("target", "platforms"), [("v5e:2x2", "cpu"), ("tpu7x:2x2x1", "cpu"), ("h200", "cpu,cuda")]
)
def test_environment_for_a_compiler_without_a_device(monkeypatch, target, platforms):
    monkeypatch.setattr(os, "environ", {})
    set_environment(target)
    assert os.environ["JAX_PLATFORMS"] == platforms
    assert ("TPU_SKIP_MDS_QUERY" in os.environ) == (":" in target)


@pytest.mark.parametrize("target", ["", "v5e", "h100:2x2", "v5e:2", "b3000"])
def test_unknown_targets_are_rejected(target):
    with pytest.raises(TargetUnavailable, match="no target"):
        set_environment(target)
