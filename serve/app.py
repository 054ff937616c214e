"""The HTTP application: wires admission, endpoints, metrics and middleware together.

`openapi.py` describes the routes that are added here.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from muxjax._version import __version__
from muxjax.serve.access.admission import Admission, FleetView
from muxjax.serve.access.middleware import RequestMiddleware
from muxjax.serve.api_page import add_api_page
from muxjax.serve.body import read_json
from muxjax.serve.errors import install_error_handlers
from muxjax.serve.fleet_protocol import ManagedFleet
from muxjax.serve.live.page import add_page
from muxjax.serve.openai.chat import chat
from muxjax.serve.openai.completions import complete
from muxjax.serve.openai.fields import CompletionRequest
from muxjax.serve.openai.requests import ChatRequest, DetokenizeRequest, TokenizeRequest
from muxjax.serve.openai.schemas import (
    ChatCompletion,
    CompletionResponse,
    DetokenizeResponse,
    TokenizeResponse,
)
from muxjax.serve.openai.tokenize import detokenize, tokenize
from muxjax.serve.openapi import add_route, complete_document
from muxjax.serve.ops.metrics import PrometheusMetrics
from muxjax.serve.ops.model_control import ModelControl
from muxjax.serve.ops.requests import LoadRequest, ModelRequest
from muxjax.serve.ops.rolling_latency import RollingLatency
from muxjax.serve.ops.schemas import (
    FleetChange,
    HealthResponse,
    ModelCard,
    ModelChange,
    ModelList,
    StatsResponse,
)
from muxjax.serve.ops.status import Status
from muxjax.serve.ops.watchdog import Watchdog
from muxjax.serve.schemas import ADMIN_ERRORS, GENERATION_ERRORS, READ_ERRORS, error_responses
from muxjax.serve.settings import ServerSettings, slo_by_model


def create_app(fleet: ManagedFleet, settings: ServerSettings | None = None) -> FastAPI:
    """Builds the application for a fleet.

    `app.state.admission` drains and aborts requests; `app.state.control` applies the fleet file.

    Args:
      fleet: the models; the caller closes it.
      settings: API keys, limits and timeouts.
    """
    settings = settings or ServerSettings()
    config = settings.server
    metrics = PrometheusMetrics(fleet.models, settings.slo)
    latency = RollingLatency()
    admission = Admission(fleet, config, (metrics, latency))
    watchdog = Watchdog(fleet, stall_timeout=config.stall_timeout, restarts=config.restarts)
    status = Status(fleet, admission, metrics, latency, watchdog)
    control = ModelControl(
        fleet,
        settings.fleet_file,
        config.max_body,
        on_reload=lambda file: metrics.set_targets(slo_by_model(file)),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watchdog.start()
        try:
            yield
        finally:
            watchdog.close()

    # FastAPI's own page under /docs loads scripts from other servers; `add_api_page` does not.
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
        observer=metrics,
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
    _add_status_routes(app, status)
    _add_generation_routes(app, config.max_body)
    _add_admin_routes(app, control)
    add_page(app)
    add_api_page(app)
    complete_document(app, needs_key=len(settings.keys) > 0)
    return app


def _add_status_routes(app: FastAPI, status: Status) -> None:
    routes = (
        ("/v1/models", status.list_models, "List the served models", ModelList),
        ("/v1/models/{name:path}", status.get_model, "Describe a model", ModelCard),
        ("/health", status.health, "Liveness of the server", HealthResponse),
        ("/health/ready", status.ready, "Readiness of the server", HealthResponse),
        ("/health/{name:path}", status.model_health, "Readiness of a model", HealthResponse),
        ("/stats", status.stats, "Counters of units and models", StatsResponse),
    )
    for path, handler, summary, response in routes:
        add_route(app, "GET", path, handler, summary, response, READ_ERRORS)
    app.add_api_route(
        "/metrics",
        status.metrics,
        methods=["GET"],
        summary="Prometheus metrics",
        response_model=None,
        response_class=PlainTextResponse,
        responses=error_responses(READ_ERRORS),
    )
    # An endless stream, which OpenAPI cannot describe.
    app.add_api_route("/stats/stream", status.stream, methods=["GET"], include_in_schema=False)


def _add_generation_routes(app: FastAPI, max_body: int) -> None:
    async def completions(request: Request) -> Response:
        return await complete(_fleet_view(request), request, await read_json(request, max_body))

    async def chat_completions(request: Request) -> Response:
        return await chat(_fleet_view(request), request, await read_json(request, max_body))

    async def tokenize_text(request: Request) -> Response:
        return await tokenize(_fleet_view(request), await read_json(request, max_body))

    async def detokenize_ids(request: Request) -> Response:
        return await detokenize(_fleet_view(request), await read_json(request, max_body))

    routes = (
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
            "Continue a conversation",
            ChatRequest,
            ChatCompletion,
        ),
        ("/tokenize", tokenize_text, "Tokenize a text", TokenizeRequest, TokenizeResponse),
        ("/detokenize", detokenize_ids, "Decode token ids", DetokenizeRequest, DetokenizeResponse),
    )
    for path, handler, summary, body, response in routes:
        add_route(app, "POST", path, handler, summary, response, GENERATION_ERRORS, body)


def _add_admin_routes(app: FastAPI, control: ModelControl) -> None:
    routes = (
        ("/models/load", control.load, "Load a model", ModelChange, LoadRequest),
        ("/models/unload", control.unload, "Unload a model", ModelChange, ModelRequest),
        ("/models/sleep", control.sleep, "Put a model to sleep", ModelChange, ModelRequest),
        ("/models/wake", control.wake, "Wake a model", ModelChange, ModelRequest),
        ("/fleet/reload", control.reload, "Apply the fleet file", FleetChange, None),
    )
    for path, handler, summary, response, body in routes:
        add_route(app, "POST", path, handler, summary, response, ADMIN_ERRORS, body)


def _fleet_view(request: Request) -> FleetView:
    """The fleet, restricted to the models that the caller may use."""
    view = request.state.view
    assert isinstance(view, FleetView)
    return view
