"""Error response models for the OpenAPI document, shared by all endpoints.

Responses are built as plain dicts, because validating each response would cost time. Tests check
them against these models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict


class ResponseModel(BaseModel):
    """Base of all response models."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(ResponseModel):
    """Description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ResponseModel):
    """Body of every response with an error status."""

    error: ErrorDetail


_DESCRIPTIONS = {
    400: "The body or one of its fields is not valid or not supported",
    401: "The API key is missing or unknown",
    403: "The API key lacks a right, or the origin is not allowed",
    404: "Unknown model",
    408: "The body did not arrive in time",
    409: "Not possible in the model's current state",
    413: "The body is too large",
    429: "A limit is reached; see the Retry-After header",
    500: "Internal error",
    503: "The engine has ended, or the server is shutting down",
    504: "The request exceeded its time limit",
}
GENERATION_ERRORS = tuple(status for status in _DESCRIPTIONS if status != 409)
"""Error statuses of endpoints that generate or tokenize."""
ADMIN_ERRORS = (400, 401, 403, 404, 408, 409, 413, 500, 503)
"""Error statuses of endpoints that change the fleet."""
READ_ERRORS = (401, 403, 404, 500, 503)
"""Error statuses of endpoints that only read."""


def error_responses(statuses: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    """Returns FastAPI's `responses` argument for these error statuses."""
    return {
        status: {"description": _DESCRIPTIONS[status], "model": ErrorBody} for status in statuses
    }
