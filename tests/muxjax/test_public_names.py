"""The names that `muxjax` exports."""

import importlib
import subprocess
import sys

import pytest

import muxjax

NAMES = {
    "Completion",
    "Delta",
    "Fleet",
    "FleetStats",
    "FunctionCall",
    "Grammar",
    "ModelHandle",
    "ModelHealth",
    "ModelStats",
    "SamplingParams",
    "Stream",
    "TokenLogprobs",
    "UnitHealth",
    "UnitStats",
    "__version__",
    "errors",
    "register_policy",
}
FLEET_METHODS = {
    "achat",
    "admin",
    "agenerate",
    "chat",
    "chat_stream",
    "close",
    "generate",
    "health",
    "load",
    "model",
    "model_states",
    "record",
    "restart",
    "stats",
    "stream",
}
HANDLE_METHODS = {"achat", "agenerate", "chat", "chat_stream", "generate", "stream"}


def test_exported_names():
    assert set(muxjax.__all__) == NAMES
    for name in NAMES:
        assert getattr(muxjax, name) is not None
    assert muxjax.errors is importlib.import_module("muxjax.errors")


def test_unknown_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="Flet"):
        _ = muxjax.Flet


def test_public_methods_of_fleets_and_model_handles():
    assert {name for name in vars(muxjax.Fleet) if not name.startswith("_")} == FLEET_METHODS
    assert {name for name in vars(muxjax.ModelHandle) if not name.startswith("_")} == HANDLE_METHODS


def test_importing_the_package_imports_no_jax():
    code = "import sys, muxjax; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
