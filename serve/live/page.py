"""Serves the live page: static files at `/` that read `/stats/stream`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # The page loads nothing from other servers and runs no inline scripts.
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Adds routes for the page and its files. The files are read once, at startup."""
    for path in sorted(FOLDER.iterdir()):
        if path.suffix not in _TYPES:
            continue
        route = "/" if path.name == "index.html" else f"/page/{path.name}"
        app.add_route(route, _serve_file(path), methods=["GET"], include_in_schema=False)


def _serve_file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    content = path.read_bytes()
    headers = {**_HEADERS, "content-type": f"{_TYPES[path.suffix]}; charset=utf-8"}

    async def get(request: Request) -> Response:
        return Response(content, headers=headers)

    return get
