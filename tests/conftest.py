"""Shapes and types in `muxjax` are checked at run time in every test."""

import os

import pytest
from jaxtyping import install_import_hook

from tests import checker

# Tests are made for the CPU, whatever else is installed. Before anything imports JAX.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Before anything imports muxjax: modules that are already loaded are not checked.
install_import_hook("muxjax", f"{checker.__name__}.{checker.checked.__name__}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes minutes, a browser or Ray is done where its marker asks for it only."""
    asked = config.option.markexpr
    markers = ("aot_tpu", "aot_cuda", "browser", "fuzz", "ray", "soak")
    unasked = {marker for marker in markers if marker not in asked}
    left_out = [item for item in items if unasked & set(item.keywords)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
