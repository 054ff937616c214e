"""Fuzzing: responses to generated requests must match the OpenAPI document.

Schemathesis generates valid and invalid requests from the document and checks status, content type
and body of each response. By default a few hundred requests are sent; `pytest -m fuzz -s` sends
more than 5,000 and prints the number of responses by status.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from muxjax.serve.app import create_app
from tests.serve.fake_fleet import EOS, FakeFleet

load_all_checks()
# A schema cannot express mutually exclusive fields or the limits of a model, so a request that
# matches the document may still be refused.
EXCLUDED = [CHECKS.get_one("positive_data_acceptance")]
SENT: Counter[tuple[str, int]] = Counter()
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", create_app(FakeFleet()))


def make_acceptable(body: dict[str, Any]) -> dict[str, Any]:
    """Removes or replaces values that the schema permits but the server refuses."""
    model = "chat" if "messages" in body else ("chat", "plain/base")[len(str(body)) % 2]
    body["model"] = model
    for name in ("stop_token_ids", "tokens"):
        if isinstance(body.get(name), list):
            body[name] = [token % EOS for token in body[name]][:6]
    if isinstance(body.get("logit_bias"), dict):
        values = list(body["logit_bias"].values())
        body["logit_bias"] = {str(at): value % 100 for at, value in enumerate(values)}
    if body.get("best_of") is not None or (body.get("min_tokens") or 0) > 0:
        body.pop("best_of", None)
        body.pop("min_tokens", None)
    if not body.get("stream"):
        body.pop("stream_options", None)
    if isinstance(body.get("stop"), list):
        body["stop"] = [text or "x" for text in body["stop"]][:16]
    if body.get("stop") == "":
        body["stop"] = "x"
    for name in ("top_p", "repetition_penalty"):
        if body.get(name) == 0:
            body[name] = 1
    if body.get("max_tokens") == 0:
        body["max_tokens"] = 1
    body["n"] = None if body.get("n") is None else body["n"] % 3 + 1
    if "prompt" in body and "tokens" not in body:
        body["prompt"] = _acceptable_prompt(body["prompt"])
    if isinstance(body.get("messages"), list):
        _make_chat_acceptable(body)
    if "n" in body and body["n"] is None:
        del body["n"]
    return body


def _acceptable_prompt(prompt: Any) -> Any:
    if isinstance(prompt, int):
        return prompt % EOS
    if isinstance(prompt, list):
        return [_acceptable_prompt(part) for part in prompt][:4] or "a"
    return prompt[:50] or "a" if isinstance(prompt, str) else prompt


def _make_chat_acceptable(body: dict[str, Any]) -> None:
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    if body.get("max_tokens") is not None:
        body.pop("max_completion_tokens", None)
    messages = []
    for message in body["messages"][:3]:
        content = message.get("content")
        content = content[:20] if isinstance(content, str) else content or "x"
        messages.append({"role": "user", "content": content})
    body["messages"] = messages
    for at, tool in enumerate(body.get("tools") or []):
        tool["function"].update(name=f"f{at}", parameters={})
    if not body.get("tools") or isinstance(body.get("tool_choice"), dict):
        body.pop("tool_choice", None)
    if "prompt" in body:
        body["prompt"] = None


@pytest.fixture(scope="module", autouse=True)
def report_counts() -> Iterator[None]:
    """Prints the number of requests, and checks that each tested path accepted at least one.

    With several test processes, each path is tested in one of them.
    """
    yield
    posts = {f"{path} {status}": count for (path, status), count in SENT.items() if "POST" in path}
    print(f"\n{sum(SENT.values())} requests, {dict(sorted(posts.items()))}")
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        sent = sum(count for (route, _), count in SENT.items() if route == f"POST {path}")
        assert sent == 0 or SENT[f"POST {path}", 200] > 0, path


def send(case: schemathesis.Case) -> None:
    # Most requests that match the document are changed so that a model accepts them.
    is_valid = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
    if is_valid and isinstance(case.body, dict) and len(str(case.body)) % 8:
        case.body = make_acceptable(dict(case.body))
    answer = case.call_and_validate(excluded_checks=EXCLUDED)
    SENT[f"{case.method} {case.path}", answer.status_code] += 1


def settings(examples: int) -> Any:
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < 100,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@SCHEMA.parametrize()
@settings(12)
def test_responses_match_the_openapi_document(case: schemathesis.Case) -> None:
    send(case)


@pytest.mark.fuzz
@SCHEMA.parametrize()
@settings(1000)
def test_thousands_of_responses_match_the_openapi_document(case: schemathesis.Case) -> None:
    send(case)
