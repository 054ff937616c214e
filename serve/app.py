"""The HTTP application: routes, OpenAPI document, errors."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from muxjax._version import __version__
from muxjax.serve.access.admission import Admission, View
from muxjax.serve.access.middleware import RequestMiddleware
from muxjax.serve.body import read_json
from muxjax.serve.errors import install_error_handlers
from muxjax.serve.fleet_protocol import ManagedFleet
from muxjax.serve.live.page import add_page
from muxjax.serve.openai.chat import chat
from muxjax.serve.openai.completions import complete
from muxjax.serve.openai.fields import CompletionRequest
from muxjax.serve.find_model import find_model
from muxjax.serve.openai.requests import (
    ChatRequest,
    DetokenizeRequest,
    LoadRequest,
    ModelRequest,
    TokenizeRequest,
)
from muxjax.serve.openai.schemas import (
    ADMIN_ERRORS,
    BODY_ERRORS,
    LOOK_ERRORS,
    ChatCompletion,
    ChatCompletionChunk,
    CompletionResponse,
    Detokenized,
    FleetChange,
    Health,
    ModelCard,
    ModelChange,
    ModelList,
    Stats,
    Tokens,
    error_responses,
)
from muxjax.serve.openai.tokenize import detokenize, tokenize
from muxjax.serve.ops.metrics import PrometheusMetrics
from muxjax.serve.ops.model_control import ModelControl
from muxjax.serve.ops.rolling_latency import RollingLatency
from muxjax.serve.ops.status import Status
from muxjax.serve.ops.watchdog import Watchdog
from muxjax.serve.settings import ServerSettings, slo_of


def create_app(fleet: ManagedFleet, settings: ServerSettings | None = None) -> FastAPI:
    """An application that answers from `fleet`. Its `state.admission` can stop it.

    Args:
      fleet: the models; stays the caller's to close.
      settings: keys, limits, time-outs.
    """
    settings = settings or ServerSettings()
    config = settings.server
    metrics = PrometheusMetrics(fleet.models, settings.slo)
    recent = RollingLatency()
    admission = Admission(fleet, config, (metrics, recent))
    watchdog = Watchdog(fleet, stall_timeout=config.stall_timeout, restarts=config.restarts)
    status = Status(fleet, admission, metrics, recent, watchdog)

    control = ModelControl(
        fleet,
        settings.fleet_file,
        config.max_body,
        reloaded=lambda file: metrics.set_targets(slo_of(file)),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watchdog.start()
        try:
            yield
        finally:
            watchdog.close()

    # The pages under /docs would load scripts from elsewhere; /openapi.json is enough.
    app = FastAPI(
        title="MuxJAX", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.admission = admission
    app.state.control = control
    install_error_handlers(app)
    app.add_middleware(
        RequestMiddleware,
        admission=admission,
        keys=settings.keys,
        config=config,
        calls=metrics,
        local_only=settings.local_only,
        tracing=settings.tracing,
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )

    async def list_models(request: Request) -> Response:
        data = [status.describe(model) for model in _view(request).models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def get_model(request: Request, name: str) -> Response:
        return JSONResponse(status.describe(find_model(_view(request), name)))

    async def completions(request: Request) -> Response:
        return await complete(_view(request), request, await read_json(request, config.max_body))

    async def chat_completions(request: Request) -> Response:
        return await chat(_view(request), request, await read_json(request, config.max_body))

    async def to_tokens(request: Request) -> Response:
        return await tokenize(_view(request), await read_json(request, config.max_body))

    async def to_text(request: Request) -> Response:
        return await detokenize(_view(request), await read_json(request, config.max_body))

    looks: tuple[tuple[str, Callable[..., Awaitable[Response]], str, type[BaseModel]], ...] = (
        ("/v1/models", list_models, "The models that are served", ModelList),
        ("/v1/models/{name:path}", get_model, "One model", ModelCard),
        ("/health", status.health, "200 while the process is of use", Health),
        ("/health/ready", status.ready, "200 while requests are welcome", Health),
        ("/health/{name:path}", status.model_health, "200 while a model answers", Health),
        ("/stats", status.stats, "Counters of units and models", Stats),
    )
    for path, handler, summary, answer in looks:
        _add(app, "GET", path, handler, summary, answer, LOOK_ERRORS)
    app.add_api_route(
        "/metrics",
        status.metrics,
        methods=["GET"],
        summary="Prometheus metrics",
        response_model=None,
        response_class=PlainTextResponse,
        responses=error_responses(LOOK_ERRORS),
    )
    # Endless, which OpenAPI has no words for.
    app.add_api_route("/stats/stream", status.stream, methods=["GET"], include_in_schema=False)
    add_page(app)
    posts = (
        (
            "/v1/completions",
            completions,
            "Continue a prompt",
            CompletionRequest,
            CompletionResponse,
        ),
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
    changes = (
        ("load", control.load, "Load a model", LoadRequest),
        ("unload", control.unload, "Drop a model", ModelRequest),
        ("sleep", control.sleep, "Put a model to sleep", ModelRequest),
        ("wake", control.wake, "Wake a model", ModelRequest),
    )
    for name, handler, summary, named in changes:
        _add(app, "POST", f"/models/{name}", handler, summary, ModelChange, ADMIN_ERRORS, named)
    reload = "Apply the fleet file as it is now"
    _add(app, "POST", "/fleet/reload", control.reload, reload, FleetChange, ADMIN_ERRORS)
    _describe_bodies(app)
    return app


def _view(request: Request) -> View:
    """The fleet as the caller may see it."""
    view = request.state.view
    assert isinstance(view, View)
    return view


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
    if answer is Health:
        responses[503] = {"description": "It does not, and why", "model": Health}
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
    bodies = (
        CompletionRequest,
        ChatRequest,
        TokenizeRequest,
        DetokenizeRequest,
        LoadRequest,
        ModelRequest,
    )
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
