"""Shapes and types in `muxjax` are checked at run time in every test."""

import os

import pytest
from jaxtyping import install_import_hook

from tests import checker

# Tests run on the CPU by default. This must be set before JAX is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The hook must be installed before muxjax is imported: loaded modules are not checked.
install_import_hook("muxjax", f"{checker.__name__}.{checker.checked.__name__}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests that are slow or need a browser or Ray, unless `-m` names their marker."""
    markers = ("aot_tpu", "aot_cuda", "browser", "fuzz", "ray", "soak")
    not_requested = {marker for marker in markers if marker not in config.option.markexpr}
    deselected = [item for item in items if not_requested & set(item.keywords)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
