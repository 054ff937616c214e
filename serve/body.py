"""Reads a request's JSON body, of bounded size and depth."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from muxjax.serve.errors import ApiError

_LARGE = 64 * 2**10
"""Bytes from which parsing leaves the event loop, which other requests' streams run on."""
_DEEPEST = 64


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object in a request's body.

    A body that says it is larger than `limit` is refused unread; one that does not say so, as soon
    as it is.

    Raises:
      ApiError: 413 for a body over `limit`, 400 for one that is not a JSON object in UTF-8.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise _too_large(limit)
    if len(body) < _LARGE:
        return parse_object(bytes(body))
    return await asyncio.to_thread(parse_object, bytes(body))


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object from its UTF-8 text, stricter than `json.loads`: no NaN, no lone surrogates.

    Raises:
      ApiError: 400, with the place of the fault.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not valid UTF-8 (byte {error.start})") from error
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
        too_deep = _deeper_than(data, _DEEPEST)
    except RecursionError:
        too_deep = True
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ApiError(f"the body is not valid JSON: {error.msg} ({place})") from error
    except ValueError as error:
        # A constant that was refused, or an integer of too many digits.
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


def _deeper_than(data: object, levels: int) -> bool:
    """Whether values are nested more than so many levels; goes through one level at a time."""
    row: list[object] = [data]
    for _ in range(levels):
        row = [
            inner for outer in row if isinstance(outer, (dict, list)) for inner in _inside(outer)
        ]
        if not row:
            return False
    return any(isinstance(value, (dict, list)) for value in row)


def _inside(value: dict[str, object] | list[object]) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else value
