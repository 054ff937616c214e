"""Structured logs: a line of JSON, or of text, for each event, with the request's id.

Prompts and outputs never get into a log. Events carry only what is passed to `event`, which is
names and numbers; and while a request is served, the message of an exception is left out of its
traceback, since it may quote what was sent. (Its type and the lines of code remain.)
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
"""The id of the request that is being served, None outside of one."""

_log = logging.getLogger("muxjax.serve")


def event(name: str, level: int = logging.INFO, **fields: str | float | bool | None) -> None:
    """Logs what has happened: a name and some fields, none of which is a prompt or an output."""
    _log.log(level, name, extra={"fields": fields})


def configure(style: LogFormat, level: int = logging.INFO) -> None:
    """Sends all logs to standard error in one form; uvicorn's own included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    for name in ("muxjax", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level if name == "muxjax" else logging.WARNING)
        logger.propagate = False


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            found["exception"] = _exception(record)
        return json.dumps(found, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """A line for people: time, event, fields."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        level = "" if record.levelno <= logging.INFO else f" {record.levelname.lower()}:"
        line = f"{clock}{level} {record.getMessage()}{fields}"
        return f"{line}\n{_exception(record)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    own = {"request_id": request_id.get()} if request_id.get() else {}
    given = {k: v for k, v in getattr(record, "fields", {}).items() if v is not None}
    return {**own, **given}


def _exception(record: logging.LogRecord) -> str:
    assert record.exc_info
    kind, error, trace = record.exc_info
    if request_id.get() is None:
        return "".join(traceback.format_exception(kind, error, trace)).rstrip()
    name = "exception" if kind is None else f"{kind.__module__}.{kind.__qualname__}"
    return f"{''.join(traceback.format_tb(trace))}{name} (its message may quote the request)"
