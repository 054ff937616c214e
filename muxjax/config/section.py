"""Base of the fleet file's sections. Imports no JAX."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

null_is_empty = BeforeValidator(lambda value: {} if value is None else value)
"""Reads null as an empty section: in YAML, a section whose lines are all commented out is null."""


class Section(BaseModel):
    """A mapping of the fleet file. Unknown keys are errors, and values are not coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
