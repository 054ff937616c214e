"""Values and suggestions in the messages of invalid fleet files; the rest is in test_fleet_file."""

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from muxjax.config.validation_messages import format_value, validation_messages


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    size: int


def messages(value: object, lines: dict[str, int]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Section.model_validate(value)
    text = validation_messages(caught.value, "a.yaml", lines, lambda _: ["size"])
    return text.splitlines()


def test_every_problem_has_its_line():
    assert messages({"size": "x", "sizes": 1}, {"size": 2, "sizes": 3}) == [
        "a.yaml:2: size: must be a whole number; got 'x'",
        "a.yaml:3: sizes: unknown key; did you mean size?",
    ]


def test_missing_key_has_no_line():
    assert messages({}, {}) == ["a.yaml: size: missing"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "nothing"),
        (True, "true"),
        ({}, "a mapping"),
        ([1, 2], "a list of 2"),
        ("x" * 80, "'" + "x" * 56 + "..."),
    ],
)
def test_values_are_shortened(value: object, text: str):
    assert format_value(value) == text
