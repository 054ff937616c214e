"""Shapes and types in `muxjax` are checked at run time in every test."""

from jaxtyping import install_import_hook

from tests import checker

# Before anything imports muxjax: modules that are already loaded are not checked.
install_import_hook("muxjax", f"{checker.__name__}.{checker.checked.__name__}")
