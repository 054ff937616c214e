"""Request bodies of the admin endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from muxjax.serve.errors import ApiError
from muxjax.serve.request_model import StrictModel, parse_body

_EXPECTED = {
    "entry": "an object",
    "model": "the name of a model",
    "unit": "the name of a unit",
}


class ModelRequest(StrictModel):
    """The body of `/models/unload`, `/models/sleep` and `/models/wake`."""

    model: str


class LoadRequest(StrictModel):
    """The body of `/models/load`."""

    model: str
    entry: dict[str, Any] | None = Field(
        default=None,
        description="The model's entry as in a fleet file, without its name. Not needed for "
        "models in the server's fleet file.",
    )
    unit: str | None = Field(
        default=None,
        description="The unit to load it on; by default the unit with the fewest bytes of weights.",
    )


def parse_model(data: Mapping[str, Any]) -> ModelRequest:
    """Parses a body that names a model.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    return parse_body(ModelRequest, data, _explain)


def parse_load(data: Mapping[str, Any]) -> LoadRequest:
    """Parses the body of `/models/load`.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    request = parse_body(LoadRequest, data, _explain)
    if request.entry is not None and "name" in request.entry:
        raise ApiError("set the model's name in `model`, not in `entry`", param="entry")
    return request


def _explain(error: ValidationError, data: Mapping[str, Any]) -> ApiError:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    problem = "is missing" if first["type"] == "missing" else f"must be {_EXPECTED[field]}"
    return ApiError(f"{field} {problem}", param=field)
