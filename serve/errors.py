"""Errors as OpenAI's API gives them: `{"error": {"message", "type", "param", "code"}}`."""

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

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CLIENT_CLOSED_REQUEST = 499
"""Nginx's status for a client that left before the answer; seen by nobody but logs."""


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
      status: the HTTP status.
      message: what is wrong, for the reader.
      param: the request's field at fault, if one is.
      code: a word for programs.
      headers: of the answer, besides those that every answer has.
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
        """The JSON answer. What was echoed from the request is made printable."""
        kind = _KINDS.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": _clean(self.message),
                "type": kind,
                "param": None if self.param is None else _clean(self.param),
                "code": self.code,
            }
        }


def api_error(error: MuxError) -> ApiError:
    """The answer to an error of the engine."""
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
    """The answer as it is sent."""
    headers = dict(error.headers)
    if error.status in (408, 413):
        # The body may still be on its way; the connection is not worth waiting for it.
        headers["connection"] = "close"
    return JSONResponse(error.body, status_code=error.status, headers=headers)


def in_words_of(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """The engine's message with the name that the field has in this endpoint's requests."""
    own = error.field or ""
    field = names.get(own, own)
    message = str(error)
    if own and message.startswith(own):
        message = field + message.removeprefix(own)
    return InvalidRequest(message, field=field or None)


def install_error_handlers(app: FastAPI) -> None:
    """Gives every error of `app` OpenAI's form."""

    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    async def on_mux_error(request: Request, error: MuxError) -> Response:
        return await on_api_error(request, api_error(error))

    async def on_http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        answer = ApiError(message, status=error.status_code)
        return JSONResponse(answer.body, status_code=answer.status, headers=error.headers)

    async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def on_fault(request: Request, error: Exception) -> Response:
        # The server logs the traceback; the client learns only that it was not the client's fault.
        answer = ApiError("internal error; the server's log has the details", status=500)
        return JSONResponse(answer.body, status_code=500)

    handlers: dict[type[Exception], Any] = {
        ApiError: on_api_error,
        MuxError: on_mux_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_disconnect,
        Exception: on_fault,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _clean(text: str) -> str:
    """Text that can be sent: without lone surrogates, and not endless."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= 1000 else text[:997] + "..."
