from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from muxjax.errors import ProfileError
from muxjax.placement.costs.cost_model import CostModel
from muxjax.placement.costs.profile_table import ProfileTable
from tests.placement.data import a100_profile


def cells(scale: float = 1.0, missing: tuple[tuple[int, int], ...] = ()) -> dict[str, Any]:
    """Prefill: batch x length / 10 ms; decode: 10 + batch + length / 100 ms."""
    return {
        str(b): {
            str(n): {"prefill": -1, "decoding": -1}
            if (b, n) in missing
            else {"prefill": scale * b * n / 10, "decoding": scale * (10 + b + n / 100)}
            for n in (100, 200, 400)
        }
        for b in (1, 2, 4, 8)
    }


def profile(**changes: Any) -> dict[str, Any]:
    return {"llama-7b": {"1": {"50": cells(2.0), "100": cells(**changes)}}}


def test_a_table_implements_the_protocol_of_cost_models() -> None:
    table = ProfileTable(profile())
    assert isinstance(table, CostModel)
    assert (table.models, table.tp_sizes("llama-7b")) == (("llama-7b",), (1,))
    assert table.shares("llama-7b", 1) == (0.5, 1.0)
    assert table.weight_bytes("llama-7b", tp=2) == pytest.approx(13.5e9 / 2, rel=1e-2)


def test_measured_points_are_exact() -> None:
    table = ProfileTable(profile())
    assert table.prefill_seconds("llama-7b", 800, 200) == pytest.approx(0.080)
    assert table.decode_seconds("llama-7b", 8, 400) == pytest.approx(0.022)
    assert table.decode_seconds("llama-7b", 8, 400, share=0.5) == pytest.approx(0.044)


def test_times_are_linear_between_points() -> None:
    table = ProfileTable(profile())
    assert table.prefill_seconds("llama-7b", 3 * 150, 150) == pytest.approx(0.045)
    assert table.decode_seconds("llama-7b", 3, 300) == pytest.approx(0.016)
    assert table.decode_seconds("llama-7b", 3, 300, share=0.75) == pytest.approx(0.024)


def test_times_are_constant_below_the_smallest_point() -> None:
    table = ProfileTable(profile())
    assert table.prefill_seconds("llama-7b", 7, 7) == pytest.approx(0.010)
    assert table.prefill_seconds("llama-7b", 50, 300) == pytest.approx(0.010)  # a chunk
    assert table.prefill_seconds("llama-7b", 0, 0) == 0
    assert table.decode_seconds("llama-7b", 0.2, 10) == pytest.approx(0.012)


def test_times_are_extrapolated_linearly_above_the_largest_point() -> None:
    table = ProfileTable(profile())
    assert table.prefill_seconds("llama-7b", 32 * 800, 800) == pytest.approx(2.56)
    assert table.decode_seconds("llama-7b", 100, 800) == pytest.approx(0.118)


def test_time_is_inversely_proportional_below_the_smallest_share() -> None:
    table = ProfileTable(profile())
    assert table.decode_seconds("llama-7b", 8, 400, share=0.25) == pytest.approx(0.088)
    with pytest.raises(ValueError, match="not 0"):
        table.decode_seconds("llama-7b", 8, 400, share=0)


def test_gaps_are_filled_along_the_batch() -> None:
    table = ProfileTable(profile(missing=((4, 400), (8, 400), (8, 200), (2, 100))))
    assert table.decode_seconds("llama-7b", 8, 400) == pytest.approx(0.022)
    assert table.decode_seconds("llama-7b", 8, 200) == pytest.approx(0.020)
    assert table.decode_seconds("llama-7b", 2, 100) == pytest.approx(0.013)
    assert table.prefill_seconds("llama-7b", 1600, 200) == pytest.approx(0.160)


def test_a_length_with_one_point_scales_the_next_shorter_length() -> None:
    table = ProfileTable(profile(missing=((2, 400), (4, 400), (8, 400))))
    assert table.prefill_seconds("llama-7b", 3200, 400) == pytest.approx(0.320)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("2", "200", "prefill"), float("nan"), "batch 2, length 200, prefill: nan is not a time"),
        (("2", "200", "decoding"), 0, "batch 2, length 200, decoding: 0 is not a time"),
        (
            ("2", "200", "decoding"),
            "fast",
            "length 200, decoding: must be a number of milliseconds",
        ),
        (("2", "200"), 3, "batch 2, length 200, prefill: must be a number"),
        (("two",), {}, "'two' is not a positive number"),
        (("2",), {}, "an object with numbers as keys"),
    ],
)
def test_errors_name_the_cell(path: tuple[str, ...], value: object, message: str) -> None:
    data = copy.deepcopy(profile())
    table = data["llama-7b"]["1"]["100"]
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    with pytest.raises(ProfileError, match=message) as caught:
        ProfileTable(data)
    assert "llama-7b, 1 devices" in str(caught.value)


def test_an_invalid_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="No such file"):
        ProfileTable(tmp_path / "none.json")
    path = tmp_path / "profile.json"
    for text, message in (
        ("{", "not a profile"),
        ("[]", "an object with models as keys"),
        ("{}", "no models"),
    ):
        path.write_text(text)
        with pytest.raises(ProfileError, match=message):
            ProfileTable(path)


def test_models_without_a_shape_are_validated_and_ignored(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**profile(), "unheard-of": profile()["llama-7b"]}))
    assert ProfileTable(path).models == ("llama-7b",)
    shape = ProfileTable(path).shape("llama-7b")
    assert ProfileTable(path, {"unheard-of": shape}).models == ("llama-7b", "unheard-of")
    path.write_text(json.dumps({**profile(), "unheard-of": {"1": {}}}))
    with pytest.raises(ProfileError, match="unheard-of, 1 devices"):
        ProfileTable(path)


def test_muxserves_profile_is_supported() -> None:
    table = ProfileTable(a100_profile())
    assert table.tp_sizes("llama-65b") == (4, 8)
    assert table.decode_seconds("llama-7b", 64, 256) == pytest.approx(0.019548)
    # This cell was not run for lack of memory, so the time is extrapolated.
    assert table.decode_seconds("llama-7b", 256, 512) > 0.055
    assert table.decode_seconds("llama-7b", 96, 256, share=0.95) < table.decode_seconds(
        "llama-7b", 96, 256, share=0.3
    )
