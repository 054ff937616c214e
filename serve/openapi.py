"""Adds routes to the application and completes its OpenAPI document.

Handlers read and validate bodies themselves, to return specific errors for size, depth and unknown
fields. They build responses as plain dicts. FastAPI gets the request and response models only for
the document.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from muxjax.serve.openai.fields import CompletionRequest
from muxjax.serve.openai.requests import ChatRequest, DetokenizeRequest, TokenizeRequest
from muxjax.serve.openai.schemas import ChatCompletionChunk, CompletionResponse
from muxjax.serve.ops.requests import LoadRequest, ModelRequest
from muxjax.serve.ops.schemas import HealthResponse
from muxjax.serve.schemas import ErrorBody, error_responses

_REQUESTS = (
    CompletionRequest,
    ChatRequest,
    TokenizeRequest,
    DetokenizeRequest,
    LoadRequest,
    ModelRequest,
)
_EVENTS = {
    "/v1/completions": CompletionResponse,
    "/v1/chat/completions": ChatCompletionChunk,
}
"""Model of each event of a streamed response, by path."""


def add_route(
    app: FastAPI,
    method: str,
    path: str,
    handler: Callable[..., Awaitable[Response]],
    summary: str,
    response: type[BaseModel],
    errors: Sequence[int] = (),
    body: type[BaseModel] | None = None,
) -> None:
    """Adds a route and its description.

    Args:
      app: the application.
      method: HTTP method.
      path: path with FastAPI's parameters.
      handler: the endpoint.
      summary: one-line description of the operation.
      response: model of the response with status 200.
      errors: error statuses of the endpoint.
      body: model of the request body, if there is one.
    """
    extra: dict[str, Any] = {}
    if body is not None:
        content = {"application/json": {"schema": _reference(body)}}
        extra["requestBody"] = {"required": True, "content": content}
    responses: dict[int | str, dict[str, Any]] = {200: {"model": response}}
    if path in _EVENTS:
        responses[200] |= _describe_events(_EVENTS[path])
    responses |= error_responses(errors)
    if response is HealthResponse:
        responses[503] = {"description": "Not healthy, with the reason", "model": HealthResponse}
    app.add_api_route(
        path,
        handler,
        methods=[method],
        summary=summary,
        response_model=None,
        responses=responses,
        openapi_extra=extra,
    )


def complete_document(app: FastAPI, needs_key: bool = False) -> None:
    """Adds the schemas of bodies and events, and removes FastAPI's validation errors.

    Args:
      app: the application with all its routes.
      needs_key: whether requests need an API key as bearer token.
    """
    _, definitions = models_json_schema(
        [
            *((body, "validation") for body in _REQUESTS),
            (ChatCompletionChunk, "serialization"),
        ],
        ref_template="#/components/schemas/{model}",
    )
    document = app.openapi()
    if needs_key:
        components = document.setdefault("components", {})
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)


def _describe_events(event: type[BaseModel]) -> dict[str, Any]:
    """Describes a streamed response: events whose `data` is JSON, then `[DONE]`."""
    json_data = [
        {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": _reference(model),
        }
        for model in (event, ErrorBody)
    ]
    schema = {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [*json_data, {"const": "[DONE]"}]}},
    }
    return {
        "description": "The response; with `stream: true`, server-sent events",
        "content": {"text/event-stream": {"schema": schema}},
    }


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
