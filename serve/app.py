"""The HTTP application: routes, OpenAPI document, errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from muxjax import __version__
from muxjax.errors import EngineDead
from muxjax.serve.body import DEFAULT_BODY_LIMIT, read_json
from muxjax.serve.chat import chat
from muxjax.serve.completions import complete
from muxjax.serve.errors import install_error_handlers
from muxjax.serve.fleet_protocol import FleetLike
from muxjax.serve.models import describe, find_model
from muxjax.serve.requests import ChatRequest, CompletionRequest


def create_app(fleet: FleetLike, *, body_limit: int = DEFAULT_BODY_LIMIT) -> FastAPI:
    """An application that answers from `fleet`.

    Args:
      fleet: the models; stays the caller's to close.
      body_limit: bytes of a request's body; larger ones get 413.
    """
    # The pages under /docs would load scripts from elsewhere; /openapi.json is enough.
    app = FastAPI(title="MuxJAX", version=__version__, docs_url=None, redoc_url=None)
    install_error_handlers(app)
    app.add_middleware(RequestId)
    created = int(time.time())

    async def list_models() -> Response:
        data = [describe(model, created) for model in fleet.models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def get_model(name: str) -> Response:
        return JSONResponse(describe(find_model(fleet, name), created))

    async def health() -> Response:
        try:
            fleet.stats()
        except EngineDead as error:
            return JSONResponse({"status": "dead", "reason": str(error)}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def completions(request: Request) -> Response:
        return await complete(fleet, request, await read_json(request, body_limit))

    async def chat_completions(request: Request) -> Response:
        return await chat(fleet, request, await read_json(request, body_limit))

    _add(app, "GET", "/v1/models", list_models, "The models that are served")
    _add(app, "GET", "/v1/models/{name:path}", get_model, "One model")
    _add(app, "GET", "/health", health, "200 while the engine runs, else 503")
    _add(app, "POST", "/v1/completions", completions, "Continue a prompt", CompletionRequest)
    _add(
        app, "POST", "/v1/chat/completions", chat_completions, "Answer a conversation", ChatRequest
    )
    _describe_bodies(app)
    return app


class RequestId:
    """Gives every answer an `x-request-id`, the client's own if it sent a printable one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        usable = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
        request_id = given if usable else f"req-{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field that is wrong or not supported"},
    404: {"description": "No such model"},
    413: {"description": "The body is too large"},
    503: {"description": "The engine has ended"},
}


def _add(
    app: FastAPI,
    method: str,
    path: str,
    handler: Callable[..., Awaitable[Response]],
    summary: str,
    body: type[BaseModel] | None = None,
) -> None:
    """Adds a route. Bodies are read and checked by hand, as their size, their depth and unknown
    fields have answers of their own; FastAPI learns of them for its OpenAPI document only.
    """
    extra = None
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        content = {"application/json": {"schema": schema}}
        extra = {"requestBody": {"required": True, "content": content}}
    app.add_api_route(
        path,
        handler,
        methods=[method],
        summary=summary,
        response_model=None,
        responses=_REFUSALS if body else None,
        openapi_extra=extra,
    )


def _describe_bodies(app: FastAPI) -> None:
    _, definitions = models_json_schema(
        [(CompletionRequest, "validation"), (ChatRequest, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    schemas = app.openapi().setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
