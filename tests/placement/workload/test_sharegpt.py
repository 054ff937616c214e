from __future__ import annotations

import json
from pathlib import Path

import pytest

from muxjax.errors import WorkloadError
from muxjax.placement.workload.sharegpt import approximate_tokens, sharegpt_lengths


def conversation(*turns: str) -> dict[str, object]:
    return {"id": "x", "conversations": [{"from": "human", "value": turn} for turn in turns]}


def test_lengths_are_of_the_first_two_turns_within_the_limits(tmp_path: Path) -> None:
    data = [
        conversation("a" * 40, "b" * 80, "c" * 400),
        conversation("only one turn of some length"),
        conversation("a", "b" * 80),
        conversation("a" * 5000, "b" * 80),
    ]
    path = tmp_path / "s.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert sharegpt_lengths(path) == [(10, 20)]
    assert sharegpt_lengths(path, lambda text: len(text) // 2) == [(20, 40)]
    assert approximate_tokens("äöü") == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "must be a list of conversations"),
        ([{"conversations": 1}], r"\[0\] has no list of conversations"),
        ([conversation("a", "b")], "no conversation of 4 to 2048 tokens"),
    ],
)
def test_invalid_files_raise(tmp_path: Path, data: object, message: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(WorkloadError, match=message):
        sharegpt_lengths(path)
