"""Structured logs: one line of JSON or text per event, with the request id.

Logs never contain prompts or outputs. An event has only the fields that are passed to `event`,
which are names and numbers. During a request, a logged traceback contains the exception type and
the lines of code, but not the exception message, which may quote the request.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from contextvars import ContextVar
from typing import Any, Literal

LogFormat = Literal["text", "json"]
request_id: ContextVar[str | None] = ContextVar("muxjax_request_id", default=None)
"""Id of the request that this context serves; None outside a request."""

_log = logging.getLogger("muxjax.serve")


def event(name: str, level: int = logging.INFO, **fields: str | float | bool | None) -> None:
    """Logs an event with its fields, which must not contain a prompt or an output."""
    _log.log(level, name, extra={"fields": fields})


def configure(style: LogFormat, level: int = logging.INFO) -> None:
    """Sends all logs, including uvicorn's, to standard error in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    for name in ("muxjax", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level if name == "muxjax" else logging.WARNING)
        logger.propagate = False


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = _exception(record)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Formats a record as one line of text: time, event, fields."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        level = "" if record.levelno <= logging.INFO else f" {record.levelname.lower()}:"
        line = f"{clock}{level} {record.getMessage()}{fields}"
        return f"{line}\n{_exception(record)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    context = {"request_id": request_id.get()} if request_id.get() else {}
    fields = getattr(record, "fields", {})
    return {**context, **{name: value for name, value in fields.items() if value is not None}}


def _exception(record: logging.LogRecord) -> str:
    assert record.exc_info
    kind, error, trace = record.exc_info
    if request_id.get() is None:
        return "".join(traceback.format_exception(kind, error, trace)).rstrip()
    name = "exception" if kind is None else f"{kind.__module__}.{kind.__qualname__}"
    return f"{''.join(traceback.format_tb(trace))}{name} (message omitted: it may quote a request)"
