"""The HTTP application: routes, OpenAPI document, errors."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from muxjax import __version__
from muxjax.serve.admission import Admission, View
from muxjax.serve.body import read_json
from muxjax.serve.chat import chat
from muxjax.serve.completions import complete
from muxjax.serve.errors import install_error_handlers
from muxjax.serve.fleet_protocol import SupervisedFleet
from muxjax.serve.front import Front
from muxjax.serve.metrics import Metrics
from muxjax.serve.models import find_model
from muxjax.serve.page import add_page
from muxjax.serve.recent import Recent
from muxjax.serve.requests import ChatRequest, CompletionRequest
from muxjax.serve.settings import Settings
from muxjax.serve.status import Status
from muxjax.serve.watchdog import Watchdog


def create_app(fleet: SupervisedFleet, settings: Settings | None = None) -> FastAPI:
    """An application that answers from `fleet`. Its `state.admission` can stop it.

    Args:
      fleet: the models; stays the caller's to close.
      settings: keys, limits, time-outs.
    """
    settings = settings or Settings()
    config = settings.server
    metrics = Metrics(fleet.models, settings.slo)
    recent = Recent()
    admission = Admission(fleet, config, (metrics, recent))
    watchdog = Watchdog(fleet, stall_timeout=config.stall_timeout, restarts=config.restarts)
    status = Status(fleet, admission, metrics, recent, watchdog)

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
    install_error_handlers(app)
    app.add_middleware(
        Front,
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

    _add(app, "GET", "/v1/models", list_models, "The models that are served")
    _add(app, "GET", "/v1/models/{name:path}", get_model, "One model")
    _add(app, "POST", "/v1/completions", completions, "Continue a prompt", CompletionRequest)
    _add(
        app, "POST", "/v1/chat/completions", chat_completions, "Answer a conversation", ChatRequest
    )
    _add(app, "GET", "/health", status.health, "200 while the process is of use, else 503")
    _add(app, "GET", "/health/ready", status.ready, "200 while requests are welcome, else 503")
    _add(app, "GET", "/health/{name:path}", status.model_health, "200 while a model answers")
    _add(app, "GET", "/metrics", status.metrics, "Prometheus metrics")
    _add(app, "GET", "/stats", status.stats, "Counters of units and models")
    _add(app, "GET", "/stats/stream", status.stream, "The same as server-sent events")
    add_page(app)
    _describe_bodies(app)
    return app


def _view(request: Request) -> View:
    """The fleet as the caller may see it."""
    view = request.state.view
    assert isinstance(view, View)
    return view


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field that is wrong or not supported"},
    401: {"description": "The API key is missing or not known"},
    403: {"description": "The API key, or the page's origin, may not"},
    404: {"description": "No such model"},
    408: {"description": "The body did not arrive in time"},
    413: {"description": "The body is too large"},
    429: {"description": "A limit is reached; see Retry-After"},
    503: {"description": "The engine has ended, or the server is stopping"},
    504: {"description": "The request took too long"},
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
