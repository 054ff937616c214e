"""`/docs`: Swagger UI for the server's OpenAPI document, without files of other servers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

# The package fastapi-offline contains the files of Swagger UI.
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>MuxJAX API</title>
<link rel="icon" href="/page/icon.svg">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
"""
_HEADERS = {
    # Swagger UI sets styles from its script and has its icons as data URLs.
    "content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_api_page(app: FastAPI) -> None:
    """Adds the routes of the page. Its files are read when they are first requested."""
    app.add_route("/docs", _serve_text(_PAGE, "text/html"), include_in_schema=False)
    app.add_route("/docs/start.js", _serve_text(_START, "text/javascript"), include_in_schema=False)
    for name, media_type in _ASSETS.items():
        app.add_route(f"/docs/{name}", _serve_asset(name, media_type), include_in_schema=False)


def _serve_text(text: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def get(request: Request) -> Response:
        return Response(text, media_type=media_type, headers=_HEADERS)

    return get


def _serve_asset(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    asset = files("fastapi_offline") / "static" / name

    async def get(request: Request) -> Response:
        return Response(asset.read_bytes(), media_type=media_type, headers=_HEADERS)

    return get
