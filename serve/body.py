"""Reads JSON request bodies of bounded size, depth and arrival time."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.types import Message, Receive

from muxjax.serve.errors import ApiError

_PARSE_IN_THREAD = 64 * 2**10
"""Bodies of this many bytes or more are parsed off the event loop, which serves all streams."""
_MAX_DEPTH = 64
"""Maximum nesting of objects and lists."""


def receive_within(receive: Receive, seconds: float) -> Receive:
    """Wraps ASGI `receive`: raises 408 unless the body arrives within `seconds`."""
    deadline = time.monotonic() + seconds
    complete = False

    async def receive_in_time() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                message = await receive()
        except TimeoutError:
            raise ApiError(
                f"the body did not arrive within {seconds:g} s", status=408, code="body_timeout"
            ) from None
        complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return receive_in_time


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """Reads the JSON object in the body of a request.

    A body with a `Content-Length` above `limit` bytes is refused before it is read. A body without
    that header is refused as soon as it exceeds the limit.

    Raises:
      ApiError: 413 for a body above `limit`, 400 for one that is not a JSON object in UTF-8.
    """
    content_length = request.headers.get("content-length", "")
    if content_length.isdecimal() and int(content_length) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise _too_large(limit)
    if len(body) < _PARSE_IN_THREAD:
        return parse_object(bytes(body))
    return await asyncio.to_thread(parse_object, bytes(body))


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses a JSON object. Stricter than `json.loads`: no NaN or Infinity, no lone surrogates.

    Raises:
      ApiError: 400, with the position of the error.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not valid UTF-8 (byte {error.start})") from error
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
        too_deep = _is_deeper_than(data, _MAX_DEPTH)
    except RecursionError:
        too_deep = True
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise ApiError(f"the body is not valid JSON: {error.msg} ({position})") from error
    except ValueError as error:
        # A refused constant, or an integer with too many digits.
        raise ApiError(f"the body is not valid JSON: {error}") from error
    if too_deep:
        raise ApiError("the body is nested too deeply")
    if not isinstance(data, dict):
        raise ApiError("the body must be a JSON object")
    if b"\\u" in body:
        try:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ApiError("the body has half a surrogate pair: not valid Unicode") from error
    return data


def _too_large(limit: int) -> ApiError:
    return ApiError(f"the body is larger than {limit} bytes", status=413, code="request_too_large")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _is_deeper_than(data: object, levels: int) -> bool:
    """Whether containers are nested more than `levels` deep, without recursion."""
    level: list[object] = [data]
    for _ in range(levels):
        level = [
            child
            for container in level
            if isinstance(container, (dict, list))
            for child in _children(container)
        ]
        if not level:
            return False
    return any(isinstance(value, (dict, list)) for value in level)


def _children(value: dict[str, object] | list[object]) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else value
