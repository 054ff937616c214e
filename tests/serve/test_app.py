"""Invalid requests and disconnects over HTTP, and the OpenAPI document."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import jsonschema
import pytest

from muxjax.errors import Overloaded
from tests.serve.fake_fleet import TEMPLATE, FakeFleet, FakeModel, fake_tokenizer
from tests.serve.request_bodies import CHAT, COMPLETION, error_of


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def tool_call(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": [[]]}, "prompt", "must not be empty"),
        ({"prompt": ["a", ""]}, "prompt", "must not be empty"),
        ({"prompt": None}, "prompt", "must be a string, a list of strings"),
        ({"prompt": 3}, "prompt", "must be a string"),
        ({"prompt": ["a", 3]}, "prompt", "must be a string"),
        ({"prompt": [1.5]}, "prompt", "must be a string"),
        ({"prompt": [True]}, "prompt", "must be a string"),
        ({"prompt": [-1]}, "prompt", "out of range"),
        ({"prompt": [258]}, "prompt", "out of range"),
        ({"prompt": [10**30]}, "prompt", ""),
        ({"prompt": "x" * 300}, "prompt", "the prompt has 301 tokens"),
        ({"model": 3}, "model", "must be the name of a model"),
        ({"model": None}, "model", "must be the name of a model"),
        ({"temperature": -1}, "temperature", "must be a number"),
        ({"temperature": "0.5"}, "temperature", "must be a number"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"temperature": [1]}, "temperature", "must be a number"),
        ({"top_p": 0}, "top_p", "must be above 0"),
        ({"top_p": 1.5}, "top_p", "must be a number"),
        ({"top_k": -2}, "top_k", "must be a whole number"),
        ({"top_k": 1.0}, "top_k", "must be a whole number"),
        ({"max_tokens": 0}, "max_tokens", "must be a whole number"),
        ({"max_tokens": 1.5}, "max_tokens", "must be a whole number"),
        ({"max_tokens": "5"}, "max_tokens", "must be a whole number"),
        ({"max_tokens": 10**20}, "max_tokens", "must be a whole number"),
        ({"seed": 1.5}, "seed", "must be a whole number"),
        ({"seed": 2**70}, "seed", "must be a whole number"),
        ({"n": 0}, "n", "must be a whole number from 1"),
        ({"n": 129}, "n", "must be a whole number from 1"),
        ({"n": 100, "prompt": ["a", "b"]}, "n", "at most 128 outputs"),
        ({"presence_penalty": 3}, "presence_penalty", "must be a number from -2"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop": 3}, "stop", "must be a string or a list of strings"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids", "must be a list of token ids"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream": 1}, "stream", "must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only for stream"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "must be true or false",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "not supported",
        ),
        ({"logprobs": 21}, "logprobs", "must be a whole number from 0 to 20"),
        ({"logprobs": True}, "logprobs", "is a number in completions"),
        ({"user": 3}, "user", "must be a string"),
        ({"echo": "yes"}, "echo", "must be true or false"),
        ({"echo": True, "model": "ids", "prompt": [1]}, "echo", "has no tokenizer"),
        ({"echo": True, "max_tokens": -1}, "max_tokens", "must be a whole number"),
        ({"best_of": 2}, "best_of", "best_of is not supported"),
        ({"best_of": True}, "best_of", "best_of is not supported"),
        ({"best_of": 1, "n": 2}, "best_of", "best_of is not supported"),
        ({"suffix": "x"}, "suffix", "suffix is not supported"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "must have token ids as keys, not 'a'"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "must have token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"1": None}}, "logit_bias", "an object of numbers by token id"),
        ({"logit_bias": [1]}, "logit_bias", "an object of numbers by token id"),
        (
            {"logit_bias": {str(token): 1 for token in range(301)}},
            "logit_bias",
            "names 301 tokens; at most 300",
        ),
        ({"min_tokens": 17}, "min_tokens", "must not be above max_tokens"),
        ({"min_tokens": -1}, "min_tokens", "must be a whole number"),
        ({"guided_regex": "a"}, "guided_regex", "unknown field"),
        (
            {"min_tokens": 1, "response_format": {"type": "json_object"}},
            "min_tokens",
            "min_tokens cannot be combined",
        ),
        ({"tools": []}, "tools", "unknown field 'tools'"),
        ({"temperatur": 1}, "temperatur", "unknown field 'temperatur'"),
    ],
)
def test_invalid_completion_fields_are_refused(
    http: httpx2.Client, fleet: FakeFleet, change: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(http.post("/v1/completions", json={**COMPLETION, **change}))
    assert error["param"] == param
    assert message in error["message"]
    assert not fleet.requests
    assert not fleet.active


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": []}, "messages", "must be a list of messages"),
        ({"messages": "hi"}, "messages", "must be a list of messages"),
        ({"messages": ["hi"]}, "messages[0]", "must be an object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a string or a list"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
        (
            {"messages": [{"role": "function", "content": "x"}]},
            "messages[0].role",
            "must be system, developer, user, assistant or tool",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].tool_call_id",
            "is missing",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
            "messages[0].tool_call_id",
            "only for the role tool",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
            "messages[0].tool_calls",
            "only for the role assistant",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [tool_call("{")]}]},
            "messages[0].tool_calls[0].function.arguments",
            "must be a string with a JSON object",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "must be a string or a list of text parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "must be a string or a list of text parts",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "name": "joe"}]},
            "messages[0].name",
            "not supported",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].id",
            "is missing",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "must be 'function'"),
        ({"tools": [tool("f g")]}, "tools[0].function.name", "must be 1 to 64 letters"),
        ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name", "the name of another tool"),
        (
            {"tools": [tool("f", {"type": "string"})]},
            "tools[0].function.parameters",
            "must be a schema of type object",
        ),
        ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
        ({"tool_choice": "any"}, "tool_choice", 'must be "none", "auto", "required" or'),
        (
            {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "names 'g', which is not in tools",
        ),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "must be true or false"),
        (
            {"response_format": {"type": "xml"}},
            "response_format",
            "must be an object with the type",
        ),
        ({"response_format": "json"}, "response_format", "must be an object with the type"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "is missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "is missing",
        ),
        (
            {"response_format": {"type": "json_object", "more": 1}},
            "response_format.more",
            "not supported",
        ),
        ({"logprobs": 3}, "logprobs", "true or false in chat"),
        ({"top_logprobs": 3}, "top_logprobs", "requires logprobs"),
        (
            {"logprobs": True, "top_logprobs": 21},
            "top_logprobs",
            "top_logprobs must be a whole number from 0 to 20",
        ),
        (
            {"max_completion_tokens": 0},
            "max_completion_tokens",
            "max_completion_tokens must be a whole number",
        ),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be a whole number"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens", "not both"),
        ({"prompt": "x"}, "prompt", "unknown field"),
        ({"model": "plain/base"}, "messages", "no chat template"),
        ({"model": "ids"}, "model", "has no tokenizer"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages", "the prompt has"),
    ],
)
def test_invalid_chat_fields_are_refused(
    http: httpx2.Client, fleet: FakeFleet, change: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(http.post("/v1/chat/completions", json={**CHAT, **change}))
    assert error["param"] == param
    assert message in error["message"]
    assert not fleet.active


def test_ignored_fields_are_accepted(http: httpx2.Client) -> None:
    ignored = {
        "logit_bias": None,
        "metadata": {},
        "service_tier": "auto",
        "store": False,
        "user": None,
    }
    nulls = dict.fromkeys(["temperature", "top_p", "n", "seed", "stop", "stream", "max_tokens"])
    completion = {"echo": False, "best_of": 1, "suffix": None, "logprobs": None, "n": 1}
    chat = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logprobs": False,
        "parallel_tool_calls": True,
        "functions": None,
    }
    answer = http.post("/v1/completions", json={**COMPLETION, **ignored, **nulls, **completion})
    assert answer.status_code == 200, answer.text
    answer = http.post("/v1/chat/completions", json={**CHAT, **ignored, **nulls, **chat})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_a_missing_field_is_named(http: httpx2.Client, missing: str) -> None:
    body = {name: value for name, value in COMPLETION.items() if name != missing}
    error = error_of(http.post("/v1/completions", json=body))
    assert error["message"] == f"{missing} is missing"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON: Expecting property name"),
        (b"[]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model": "chat", "prompt": "\xff"}', "not valid UTF-8 (byte 29)"),
        (b'{"model": "chat", "prompt": "\\ud800"}', "half a surrogate pair"),
        (b'{"model": "\\ud800", "prompt": "x"}', "half a surrogate pair"),
        (b'{"model": "chat", "prompt": "x", "temperature": NaN}', "NaN is not a JSON value"),
        (b'{"model": "chat", "prompt": "x", "temperature": -Infinity}', "not a JSON value"),
        (b'{"model": "chat", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 70 + b"]" * 70, "nested too deeply"),
        (b'{"model": "chat", "prompt": "x"} x', "not valid JSON: Extra data"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
    ],
)
def test_invalid_bodies_are_refused(http: httpx2.Client, body: bytes, message: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert message in error_of(http.post(path, content=body))["message"]
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200


def test_a_number_that_overflows_is_refused(http: httpx2.Client) -> None:
    body = b'{"model": "chat", "prompt": "x", "temperature": 1e999}'
    assert error_of(http.post("/v1/completions", content=body))["param"] == "temperature"


def test_unknown_models_and_paths_are_refused(http: httpx2.Client) -> None:
    error = error_of(http.post("/v1/completions", json={**COMPLETION, "model": "gpt"}), 404)
    assert (
        error["message"]
        == "model 'gpt' is not served here; available models: chat, plain/base, ids"
    )
    assert error_of(http.get("/v1/models/gpt"), 404)["code"] == "model_not_found"
    assert "POST /v1/embeddings" in error_of(http.post("/v1/embeddings", json={}), 404)["message"]
    error_of(http.get("/v1/completions"), 405)


def test_an_overloaded_fleet_refuses_with_503(http: httpx2.Client, fleet: FakeFleet) -> None:
    fleet.refusal = Overloaded("chat has 90 requests before this one", retry_after=1.2)
    answer = http.post("/v1/completions", json=COMPLETION)
    assert error_of(answer, 503)["code"] == "overloaded"
    assert answer.headers["retry-after"] == "2"


def test_priority_is_validated_and_reaches_the_engine(
    http: httpx2.Client, fleet: FakeFleet
) -> None:
    assert http.post("/v1/completions", json={**COMPLETION, "priority": 3}).status_code == 200
    assert fleet.requests[-1][2].priority == 3
    error = error_of(http.post("/v1/completions", json={**COMPLETION, "priority": 1000}))
    assert error["param"] == "priority"


def test_cache_salt_is_validated_and_reaches_the_engine(
    http: httpx2.Client, fleet: FakeFleet
) -> None:
    for path, body in (("completions", COMPLETION), ("chat/completions", CHAT)):
        answer = http.post(f"/v1/{path}", json={**body, "cache_salt": "mine"})
        assert answer.status_code == 200
        assert fleet.requests[-1][2].cache_salt == "mine"
        for wrong in ("", "x" * 257, 3):
            error = error_of(http.post(f"/v1/{path}", json={**body, "cache_salt": wrong}))
            assert error["param"] == "cache_salt"
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200
    assert fleet.requests[-1][2].cache_salt is None


@pytest.mark.parametrize("stream", [False, True])
def test_usage_counts_cached_tokens(http: httpx2.Client, stream: bool) -> None:
    body = {"model": "chat", "prompt": ["x" * 20, "y"], "n": 2, "max_tokens": 2, "stream": stream}
    if not stream:
        usage = http.post("/v1/completions", json=body).json()["usage"]
    else:
        body["stream_options"] = {"include_usage": True}
        lines = http.post("/v1/completions", json=body).text.split("\n\n")
        usage = json.loads(lines[-3].removeprefix("data: "))["usage"]
    # The fake caches whole blocks of 16 tokens. Each prompt counts once.
    assert usage == {
        "prompt_tokens": 23,
        "completion_tokens": 8,
        "total_tokens": 31,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


def test_health_reports_a_dead_engine(http: httpx2.Client, fleet: FakeFleet) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    fleet.dead = "the engine's loop has ended: out of memory"
    answer = http.get("/health")
    assert answer.status_code == 503
    assert answer.json() == {"status": "dead", "reason": fleet.dead}
    error = error_of(http.post("/v1/completions", json=COMPLETION), 503)
    assert error["code"] == "engine_dead"
    error_of(http.post("/v1/chat/completions", json={**CHAT, "stream": True}), 503)


def test_valid_request_ids_are_kept(http: httpx2.Client) -> None:
    ids = {http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    answer = http.get("/health", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    answer = http.get("/health", headers={"x-request-id": "x" * 500})
    assert answer.headers["x-request-id"].startswith("req-")


def test_event_stream_format(http: httpx2.Client) -> None:
    answer = http.post("/v1/completions", json={**COMPLETION, "max_tokens": 2, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert [event["choices"][0]["text"] for event in events] == ["a", "b"]
    assert all(event["object"] == "text_completion" for event in events)


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", {**COMPLETION, "logprobs": 2, "echo": True}, "CompletionResponse"),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "n": 2}, "ChatCompletionChunk"),
        ("/v1/chat/completions", {**CHAT, "tools": [tool("f")]}, "ChatCompletionChunk"),
    ],
)
def test_events_match_the_openapi_document(
    http: httpx2.Client, fleet: FakeFleet, path: str, body: dict[str, Any], name: str
) -> None:
    fleet.models = {"chat": FakeModel("chat", fake_tokenizer(TEMPLATE), 4096)}
    fleet.text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    document = http.get("/openapi.json").json()
    schema = {**document, "$ref": f"#/components/schemas/{name}"}
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    lines = [line for line in http.post(path, json=request).text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        jsonschema.validate(json.loads(line.removeprefix("data: ")), schema)


def test_openapi_document_has_every_route_and_schema(http: httpx2.Client) -> None:
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/health",
        "/health/ready",
        "/health/{name}",
        "/metrics",
        "/stats",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
        "/models/load",
        "/models/unload",
        "/models/sleep",
        "/models/wake",
        "/fleet/reload",
    }
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas
    assert "prompt" in schemas["CompletionRequest"]["required"]
