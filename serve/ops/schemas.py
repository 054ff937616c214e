"""Response models of the status and admin endpoints, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from muxjax.engine.health import ModelStatus
from muxjax.serve.schemas import ResponseModel


class ModelCard(ResponseModel):
    """A served model."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    status: ModelStatus
    error: str | None = None
    unit: str | None


class ModelList(ResponseModel):
    """The served models."""

    object: Literal["list"]
    data: list[ModelCard]


class HealthResponse(ResponseModel):
    """Response of `/health` and the paths under it, with any HTTP status."""

    status: str
    reason: str | None = None
    unit: str | None = None


class ModelChange(ResponseModel):
    """State of a model after a change."""

    model: str
    status: ModelStatus | Literal["unloaded"]
    seconds: float


class FleetChange(ResponseModel):
    """Result of a reload: names of models, and errors by model."""

    added: list[str]
    removed: list[str]
    replaced: list[str]
    changed: list[str]
    failed: dict[str, str]


class StatsResponse(ResponseModel):
    """Response of `/stats`: the data of the live page, with all counters of each model."""

    time: float
    stopping: bool
    stale: bool
    policy: str | None
    pool: dict[str, int]
    units: list[dict[str, Any]]
    models: list[dict[str, Any]]
