"""Looks up the model that a request names."""

from __future__ import annotations

from muxjax.serve.errors import ApiError
from muxjax.serve.fleet_protocol import FleetLike, ModelLike


def find_model(fleet: FleetLike, name: str) -> ModelLike:
    """Returns the model with this name.

    Raises:
      ApiError: 404, with the names of the available models.
    """
    model = fleet.models.get(name)
    if model is None:
        raise ApiError(
            f"model {name!r} is not served here; available models: {', '.join(fleet.models)}",
            status=404,
            param="model",
            code="model_not_found",
        )
    return model
