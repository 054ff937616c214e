"""Types that a model and its pool get."""

import pytest

from muxjax.config.fleet_file import ModelEntry
from muxjax.pallas_kernels.cpu import native
from muxjax.units.build_model_spec import pool_dtype, resolve_dtype
from tests.muxjax.tiny_fleets import entry


@pytest.mark.parametrize(
    ("dtypes", "halves", "wanted"),
    [
        (["bfloat16", "bfloat16"], True, "bfloat16"),
        (["bfloat16", "float32"], True, "float32"),
        (["bfloat16"], False, "float32"),
    ],
)
def test_the_pool_of_a_cpu(
    dtypes: list[str], halves: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "prefers_bfloat16_pool", lambda: halves)
    assert pool_dtype(dtypes) == wanted


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, "float32"),
        ({"quantization": "int8"}, "bfloat16"),
        ({"quantization": "int8", "dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_the_type_of_a_model_on_a_cpu(more: dict[str, str], wanted: str) -> None:
    assert resolve_dtype(ModelEntry.model_validate(entry("llama", **more))) == wanted
