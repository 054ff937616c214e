"""Finds the model that a request names."""

from __future__ import annotations

from muxjax.serve.errors import ApiError
from muxjax.serve.fleet_protocol import FleetLike, ModelLike


def find_model(fleet: FleetLike, name: str) -> ModelLike:
    """The model that a request names.

    Raises:
      ApiError: 404, with the names that there are.
    """
    model = fleet.models.get(name)
    if model is None:
        raise ApiError(
            f"no model {name!r} is served here; there are {', '.join(fleet.models)}",
            status=404,
            param="model",
            code="model_not_found",
        )
    return model
