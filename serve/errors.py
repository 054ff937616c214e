"""Error responses in the format of OpenAI's API.

The body is `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from muxjax.errors import (
    EngineDead,
    InvalidRequest,
    ModelUnavailable,
    MuxError,
    Overloaded,
    TimedOut,
    UnknownModel,
    WrongState,
)

CLIENT_CLOSED_REQUEST = 499
"""Status of a call whose client disconnected before the response; it appears in logs only."""
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MAX_TEXT = 1000
"""Maximum number of characters of a message or field name in a response."""


class ApiError(Exception):
    """An error response.

    Attributes:
      status: the HTTP status.
      message: what is wrong and what to do.
      param: the request field at fault, if there is one.
      code: machine-readable error code.
      headers: additional response headers.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body. Text that quotes the request is shortened and made encodable."""
        error_type = _ERROR_TYPES.get(self.status)
        if error_type is None:
            error_type = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": _printable(self.message),
                "type": error_type,
                "param": None if self.param is None else _printable(self.param),
                "code": self.code,
            }
        }


def api_error(error: MuxError) -> ApiError:
    """Maps an engine error to an error response."""
    if isinstance(error, UnknownModel):
        return ApiError(str(error), status=404, param="model", code="model_not_found")
    if isinstance(error, InvalidRequest):
        return ApiError(str(error), param=error.field)
    if isinstance(error, Overloaded):
        headers = {"retry-after": str(math.ceil(error.retry_after))}
        return ApiError(str(error), status=503, code="overloaded", headers=headers)
    if isinstance(error, EngineDead):
        return ApiError(str(error), status=503, code="engine_dead", headers={"retry-after": "5"})
    if isinstance(error, ModelUnavailable):
        return ApiError(str(error), status=503, param="model", code="model_unavailable")
    if isinstance(error, WrongState):
        return ApiError(str(error), status=409, param="model", code="wrong_state")
    if isinstance(error, TimedOut):
        return ApiError(str(error), status=504, code="timeout")
    return ApiError(str(error), status=500)


def error_response(error: ApiError) -> Response:
    """Builds the HTTP response for an error."""
    headers = dict(error.headers)
    if error.status in (408, 413):
        # The rest of the body may still arrive, so the connection cannot be reused.
        headers["connection"] = "close"
    return JSONResponse(error.body, status_code=error.status, headers=headers)


def rename_field(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """Replaces the engine's field name in an error with the name that the endpoint uses.

    Args:
      error: an error of the engine.
      names: endpoint field names by engine field name, where they differ.
    """
    engine_name = error.field or ""
    field = names.get(engine_name, engine_name)
    message = str(error)
    if engine_name and message.startswith(engine_name):
        message = field + message.removeprefix(engine_name)
    return InvalidRequest(message, field=field or None)


def install_error_handlers(app: FastAPI) -> None:
    """Installs handlers that convert every error of `app` to OpenAI's error format."""

    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    async def on_mux_error(request: Request, error: MuxError) -> Response:
        return await on_api_error(request, api_error(error))

    async def on_http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = ApiError(message, status=error.status_code)
        return JSONResponse(response.body, status_code=response.status, headers=error.headers)

    async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def on_internal_error(request: Request, error: Exception) -> Response:
        # The server logs the traceback, which the client must not see.
        response = ApiError("internal error; see the server log", status=500)
        return JSONResponse(response.body, status_code=500)

    handlers: dict[type[Exception], Any] = {
        ApiError: on_api_error,
        MuxError: on_mux_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_disconnect,
        Exception: on_internal_error,
    }
    for error_class, handler in handlers.items():
        app.add_exception_handler(error_class, handler)


def _printable(text: str) -> str:
    """Replaces lone surrogates, which UTF-8 cannot encode, and limits the length."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
