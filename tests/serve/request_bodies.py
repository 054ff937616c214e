"""Valid request bodies, and the error of a response."""

from __future__ import annotations

from typing import Any

import httpx2

COMPLETION = {"model": "chat", "prompt": "ab"}
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


def error_of(answer: httpx2.Response, status: int = 400) -> dict[str, Any]:
    """Returns the error of a response, checked for OpenAI's format."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error
