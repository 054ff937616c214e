"""The HTTP application: routes, OpenAPI document, errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
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
from muxjax.serve.fields import CompletionRequest
from muxjax.serve.fleet_protocol import FleetLike
from muxjax.serve.models import describe, find_model
from muxjax.serve.requests import ChatRequest, DetokenizeRequest, TokenizeRequest
from muxjax.serve.schemas import (
    BODY_ERRORS,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Detokenized,
    Health,
    ModelCard,
    ModelList,
    Tokens,
    error_responses,
)
from muxjax.serve.tokens import detokenize, tokenize


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

    async def to_tokens(request: Request) -> Response:
        return await tokenize(fleet, await read_json(request, body_limit))

    async def to_text(request: Request) -> Response:
        return await detokenize(fleet, await read_json(request, body_limit))

    _add(app, "GET", "/v1/models", list_models, "The models that are served", ModelList)
    _add(app, "GET", "/v1/models/{name:path}", get_model, "One model", ModelCard, (404,))
    _add(app, "GET", "/health", health, "200 while the engine runs, else 503", Health)
    posts = (
        ("/v1/completions", completions, "Continue a prompt", CompletionRequest, Completion),
        (
            "/v1/chat/completions",
            chat_completions,
            "Answer a conversation",
            ChatRequest,
            ChatCompletion,
        ),
        ("/tokenize", to_tokens, "The token ids of a text", TokenizeRequest, Tokens),
        ("/detokenize", to_text, "The text of token ids", DetokenizeRequest, Detokenized),
    )
    for path, handler, summary, body, answer in posts:
        _add(app, "POST", path, handler, summary, answer, BODY_ERRORS, body)
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


def _add(
    app: FastAPI,
    method: str,
    path: str,
    handler: Callable[..., Awaitable[Response]],
    summary: str,
    answer: type[BaseModel],
    errors: Sequence[int] = (),
    body: type[BaseModel] | None = None,
) -> None:
    """Adds a route. Bodies are read and checked by hand, as their size, their depth and unknown
    fields have answers of their own, and answers are made as plain dicts; FastAPI learns of both
    for its OpenAPI document only.
    """
    extra: dict[str, Any] = {}
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        content = {"application/json": {"schema": schema}}
        extra["requestBody"] = {"required": True, "content": content}
    responses: dict[int | str, dict[str, Any]] = {200: {"model": answer}}
    if path in _EVENTS:
        responses[200] |= _EVENTS[path]
    responses |= error_responses(errors)
    app.add_api_route(
        path,
        handler,
        methods=[method],
        summary=summary,
        response_model=None,
        responses=responses,
        openapi_extra=extra,
    )


def _events(event: str) -> dict[str, Any]:
    """How a streamed answer is described: its events' `data` is JSON, and at last `[DONE]`."""
    parts = {"contentMediaType": "application/json"}
    data = [
        {"type": "string", **parts, "contentSchema": {"$ref": f"#/components/schemas/{name}"}}
        for name in (event, "ErrorAnswer")
    ]
    schema = {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [*data, {"const": "[DONE]"}]}},
    }
    return {
        "description": "The answer; with `stream: true` server-sent events, each with a part of it",
        "content": {"text/event-stream": {"schema": schema}},
    }


_EVENTS = {
    "/v1/completions": _events("Completion"),
    "/v1/chat/completions": _events("ChatCompletionChunk"),
}


def _describe_bodies(app: FastAPI) -> None:
    """Adds the bodies and the events; takes out FastAPI's own form of errors, which is not ours."""
    bodies = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
    _, definitions = models_json_schema(
        [
            *((body, "validation") for body in bodies),
            (ChatCompletionChunk, "serialization"),
        ],
        ref_template="#/components/schemas/{model}",
    )
    document = app.openapi()
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
