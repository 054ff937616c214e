"""Formats of log lines, and text that they must not contain."""

from __future__ import annotations

import json
import logging

from muxjax.serve import logs
from muxjax.serve.logs import JsonFormatter, TextFormatter


def record(message: str = "request", **fields: object) -> logging.LogRecord:
    log_record = logging.LogRecord("muxjax.serve", logging.WARNING, "f.py", 1, message, (), None)
    log_record.fields = fields
    return log_record


def failure(quote: str) -> logging.LogRecord:
    log_record = record("failed")
    try:
        raise ValueError(f"cannot use {quote}")
    except ValueError as error:
        log_record.exc_info = (type(error), error, error.__traceback__)
    return log_record


def test_json_format() -> None:
    line = json.loads(JsonFormatter().format(record(status=200, key=None, path="/ü")))
    assert (line["event"], line["level"], line["status"]) == ("request", "warning", 200)
    assert line["path"] == "/ü"
    assert "key" not in line
    assert "request_id" not in line


def test_text_format() -> None:
    assert TextFormatter().format(record(status=200)).endswith(" warning: request status=200")


def test_exceptions_do_not_quote_requests() -> None:
    token = logs.request_id.set("req-1")
    try:
        line = json.loads(JsonFormatter().format(failure("a private prompt")))
        text = TextFormatter().format(failure("a private prompt"))
    finally:
        logs.request_id.reset(token)
    assert line["request_id"] == "req-1"
    assert "builtins.ValueError" in line["exception"]
    assert "test_logs.py" in line["exception"]
    assert "private" not in line["exception"] + text
    # Outside a request, the message is kept.
    assert "a disk" in JsonFormatter().format(failure("a disk"))


def test_all_logs_share_one_format() -> None:
    names = ("muxjax", "uvicorn")
    before = [(logging.getLogger(n).handlers[:], logging.getLogger(n).level) for n in names]
    try:
        logs.configure("json")
        for name in names:
            (handler,) = logging.getLogger(name).handlers
            assert isinstance(handler.formatter, JsonFormatter)
    finally:
        for name, (handlers, level) in zip(names, before, strict=True):
            logger = logging.getLogger(name)
            logger.handlers[:], logger.propagate = handlers, True
            logger.setLevel(level)
