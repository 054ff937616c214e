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
    """Compiling for other devices, and the long fuzzing, take minutes: where asked for only."""
    asked = config.option.markexpr
    unasked = {marker for marker in ("aot_tpu", "aot_cuda", "fuzz") if marker not in asked}
    left_out = [item for item in items if unasked & set(item.keywords)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
