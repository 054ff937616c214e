"""Echo, logit bias and response format with OpenAI's client; tokenization endpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from muxjax.grammar import Grammar
from tests.serve.fake_fleet import BOS, EOS, FakeFleet

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_biases_and_min_tokens_reach_the_engine(client: openai.OpenAI, fleet: FakeFleet) -> None:
    client.completions.create(
        model="chat",
        prompt="ab",
        logit_bias={"97": -100, "5": 2.5},  # type: ignore[dict-item]
        extra_body={"min_tokens": 3},
    )
    params = fleet.requests[0][2]
    assert params.logit_bias == {97: -100.0, 5: 2.5}
    assert params.min_tokens == 3


def test_echo(client: openai.OpenAI, fleet: FakeFleet) -> None:
    answer = client.completions.create(
        model="chat", prompt=["ab", "éz"], echo=True, max_tokens=2, n=2
    )
    assert [choice.text for choice in answer.choices] == ["abab", "abab", "ézé", "ézé"]
    assert fleet.requests[0][2].prompt_logprobs is None
    by_ids = client.completions.create(model="chat", prompt=[98, 99], echo=True, max_tokens=1)
    assert by_ids.choices[0].text == "bcb"


def test_echo_with_logprobs(client: openai.OpenAI, fleet: FakeFleet) -> None:
    answer = client.completions.create(
        model="chat", prompt="éb", echo=True, max_tokens=2, logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert fleet.requests[0][2].prompt_logprobs == 1
    assert answer.choices[0].text == "ébé"
    assert logprobs.tokens == ["<bos>", "�", "�", "b", "�", "�"]
    assert logprobs.text_offset == [0, 0, 0, 1, 2, 2]
    assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5, -0.5]
    assert logprobs.top_logprobs
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[3] == {"b": -0.5}


@pytest.mark.parametrize("stream", [True, False])
def test_echo_without_output_scores_the_prompt(client: openai.OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {"model": "chat", "prompt": "abc", "echo": True, "max_tokens": 0}
    if stream:
        options = {"stream_options": {"include_usage": True}}
        events = list(client.completions.create(**fields, logprobs=0, stream=True, **options))
        assert len(events) == 2
        choice, usage = events[0].choices[0], events[1].usage
    else:
        answer = client.completions.create(**fields, logprobs=0)
        choice, usage = answer.choices[0], answer.usage
    assert (choice.text, choice.finish_reason) == ("abc", "length")
    assert choice.logprobs
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, 0)


def test_echo_streams_the_prompt_first(client: openai.OpenAI) -> None:
    events = client.completions.create(
        model="chat", prompt="ab", echo=True, max_tokens=3, logprobs=0, stream=True
    )
    choices = [event.choices[0] for event in events]
    assert [choice.text for choice in choices] == ["aba", "b", "a"]
    assert all(choice.logprobs for choice in choices)
    offsets = [at for c in choices if c.logprobs for at in c.logprobs.text_offset or ()]
    assert offsets == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("response_format", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar.json_object()),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
            Grammar.json_schema(SCHEMA),
        ),
    ],
)
def test_response_format_becomes_a_grammar(
    client: openai.OpenAI, fleet: FakeFleet, response_format: Any, grammar: Grammar | None
) -> None:
    fleet.text = '{"a": 1}'
    answer = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": "x"}], response_format=response_format
    )
    assert answer.choices[0].message.content == '{"a": 1}'
    client.completions.create(
        model="chat", prompt="x", extra_body={"response_format": response_format}
    )
    assert [params.grammar for _, _, params in fleet.requests] == [grammar, grammar]


def test_tokenize(http: httpx2.Client) -> None:
    body: dict[str, Any] = {"model": "chat", "prompt": "ab"}
    answer = http.post("/tokenize", json=body).json()
    assert answer == {
        "count": 3,
        "max_model_len": 256,
        "tokens": [BOS, 97, 98],
        "token_strs": None,
    }
    body |= {"add_special_tokens": False, "return_token_strs": True}
    answer = http.post("/tokenize", json=body).json()
    assert (answer["tokens"], answer["token_strs"]) == ([97, 98], ["a", "b"])


def test_tokenize_a_conversation(http: httpx2.Client) -> None:
    body: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
    answer = http.post("/tokenize", json=body).json()
    assert bytes(answer["tokens"]) == b"<user>hi\n<assistant>"
    answer = http.post("/tokenize", json={**body, "add_generation_prompt": False}).json()
    assert bytes(answer["tokens"]) == b"<user>hi\n"


def test_detokenize(http: httpx2.Client) -> None:
    tokens = [BOS, *"hé".encode(), EOS]
    answer = http.post("/detokenize", json={"model": "chat", "tokens": tokens})
    assert answer.json() == {"prompt": "<bos>hé<eos>"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "a", "model": "ids"}, "model"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_invalid_tokenize_requests_are_refused(
    http: httpx2.Client, path: str, body: dict[str, Any], param: str
) -> None:
    answer = http.post(path, json={"model": "chat", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert json.loads(answer.text)["error"]["type"] == "invalid_request_error"
