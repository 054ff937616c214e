"""Strict pydantic models for request bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from muxjax.serve.errors import ApiError


class StrictModel(BaseModel):
    """A request body or a part of one. Nothing is coerced, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def parse_body[Body: StrictModel](
    model: type[Body],
    data: Mapping[str, Any],
    explain: Callable[[ValidationError, Mapping[str, Any]], ApiError],
    ignored: Mapping[str, tuple[object, ...]] | None = None,
) -> Body:
    """Validates a request body.

    Args:
      model: the model of the body.
      data: the JSON object.
      explain: builds the error response for a body that does not match the model.
      ignored: fields that are accepted and dropped if they are null or have one of these values.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    known = {}
    for name, value in data.items():
        if name in model.model_fields:
            known[name] = value
        elif ignored is None or name not in ignored:
            raise ApiError(f"unknown field {name!r}", param=name, code="unknown_field")
        elif value is not None and not any(_is_same(value, allowed) for allowed in ignored[name]):
            raise ApiError(
                f"{name} is not supported by this server", param=name, code="unsupported_field"
            )
    try:
        return model.model_validate(known)
    except ValidationError as error:
        raise explain(error, data) from error


def _is_same(value: object, other: object) -> bool:
    """Whether two values have the same type and are equal: `true` is not 1."""
    return type(value) is type(other) and value == other
