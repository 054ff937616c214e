"""Default types of a model and of the pool."""

import pytest

from muxjax.config.model_entry import ModelEntry
from muxjax.pallas_kernels.cpu import native
from muxjax.units.build_model_spec import pool_dtype, resolve_dtype
from tests.muxjax.tiny_fleets import entry


@pytest.mark.parametrize(
    ("dtypes", "prefers_bfloat16", "wanted"),
    [
        (["bfloat16", "bfloat16"], True, "bfloat16"),
        (["bfloat16", "float32"], True, "float32"),
        (["bfloat16"], False, "float32"),
    ],
)
def test_pool_dtype_on_a_cpu(
    dtypes: list[str], prefers_bfloat16: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "prefers_bfloat16_pool", lambda: prefers_bfloat16)
    assert pool_dtype(dtypes) == wanted


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "float32"),
        ({"quantization": "int8"}, "bfloat16"),
        ({"quantization": "int8", "dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_model_dtype_on_a_cpu(settings: dict[str, str], wanted: str) -> None:
    assert resolve_dtype(ModelEntry.model_validate(entry("llama", **settings))) == wanted
