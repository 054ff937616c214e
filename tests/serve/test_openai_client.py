"""OpenAI's client with a live server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.serve.conftest import wait_until
from tests.serve.fake_fleet import BOS, FakeFleet


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["chat", "plain/base", "ids"]
    assert client.models.retrieve("plain/base").owned_by == "muxjax"
    with pytest.raises(openai.NotFoundError, match="available models: chat, plain/base, ids"):
        client.models.retrieve("other")


def test_completion(client: openai.OpenAI, fleet: FakeFleet) -> None:
    answer = client.completions.create(model="chat", prompt="ab", max_tokens=5)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == ("ababa", "length", 0)
    assert choice.logprobs is None
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == "chat"
    assert answer.system_fingerprint
    assert answer.usage
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert fleet.requests[0][1] == [BOS, *b"ab"]
    assert not fleet.active


def test_completion_defaults_match_openai(client: openai.OpenAI, fleet: FakeFleet) -> None:
    client.completions.create(model="chat", prompt="ab")
    params = fleet.requests[0][2]
    assert (params.max_tokens, params.temperature, params.top_p) == (16, 1.0, 1.0)
    assert (params.seed, params.logprobs, params.stop) == (None, None, ())


def test_every_sampling_field_reaches_the_engine(client: openai.OpenAI, fleet: FakeFleet) -> None:
    client.completions.create(
        model="chat",
        prompt="ab",
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        stop=["x", "yz"],
        seed=7,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        user="someone",
        extra_body={
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "stop_token_ids": [3],
        },
    )
    params = fleet.requests[0][2]
    assert (params.max_tokens, params.temperature, params.top_p) == (3, 0.5, 0.9)
    assert (params.stop, params.seed) == (("x", "yz"), 7)
    assert (params.presence_penalty, params.frequency_penalty) == (0.25, -0.5)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (40, 0.05, 1.1)
    assert (params.ignore_eos, params.stop_token_ids) == (True, (3,))


@pytest.mark.parametrize("top_k", [-1, 0])
def test_top_k_zero_and_minus_one_mean_off(
    client: openai.OpenAI, fleet: FakeFleet, top_k: int
) -> None:
    client.completions.create(model="chat", prompt="ab", extra_body={"top_k": top_k})
    assert fleet.requests[0][2].top_k == 0


def test_several_prompts_and_outputs(client: openai.OpenAI, fleet: FakeFleet) -> None:
    answer = client.completions.create(model="chat", prompt=["a", "bc"], n=2, seed=10, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["aaa", "aaa", "bcb", "bcb"]
    assert [params.seed for _, _, params in fleet.requests] == [10, 11, 10, 11]
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 12)


def test_prompts_of_token_ids(client: openai.OpenAI, fleet: FakeFleet) -> None:
    by_ids = client.completions.create(model="ids", prompt=[97, 98], max_tokens=2)
    assert by_ids.choices[0].text == ""  # this model has no tokenizer
    batch = client.completions.create(model="chat", prompt=[[97], [98, 99]], max_tokens=2)
    assert [choice.text for choice in batch.choices] == ["aa", "bc"]
    assert [prompt for _, prompt, _ in fleet.requests] == [[97, 98], [97], [98, 99]]


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="chat", prompt="ab", max_tokens=3, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.tokens == ["a", "b", "a"]
    assert logprobs.token_logprobs == [-0.5, -0.5, -0.5]
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs
    assert logprobs.top_logprobs[0] == {"a": -0.5, "`": -1.5, "\0": -9999.0}
    bare = client.completions.create(model="chat", prompt="ab", max_tokens=3, logprobs=0)
    assert bare.choices[0].logprobs
    assert bare.choices[0].logprobs.top_logprobs is None
    assert bare.choices[0].logprobs.token_logprobs == [-0.5, -0.5, -0.5]


def test_completion_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="chat",
        prompt=["ab", "c"],
        max_tokens=3,
        logprobs=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = {0: "", 1: ""}
    offsets: dict[int, list[int]] = {0: [], 1: []}
    ends = {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        assert choice.logprobs
        offsets[choice.index] += choice.logprobs.text_offset or []
        ends[choice.index] = choice.finish_reason
        assert chunk.usage is None
    assert texts == {0: "aba", 1: "ccc"}
    assert offsets == {0: [0, 1, 2], 1: [0, 1, 2]}
    assert ends == {0: "length", 1: "length"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (5, 6)
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_without_usage(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="chat", prompt="a", max_tokens=3, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["a", "a", "a"]
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_chat(client: openai.OpenAI, fleet: FakeFleet) -> None:
    fleet.text = "Grüße 🙂"
    answer = client.chat.completions.create(
        model="chat",
        messages=[
            {"role": "developer", "content": "be kind"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}],
            },
        ],
    )
    (choice,) = answer.choices
    assert choice.message.content == "Grüße 🙂"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    _, prompt, params = fleet.requests[0]
    # The template's text without an additional begin token.
    assert bytes(prompt) == b"<system>be kind\n<user>hi\n<assistant>"
    assert params.max_tokens == 256 - len(prompt)


def test_a_response_message_is_a_valid_request_message(
    client: openai.OpenAI, fleet: FakeFleet
) -> None:
    question = {"role": "user", "content": "hi"}
    first = client.chat.completions.create(model="chat", messages=[question], max_tokens=2)
    reply = first.choices[0].message.model_dump()
    client.chat.completions.create(
        model="chat", messages=[question, reply, question], max_completion_tokens=2
    )
    assert bytes(fleet.requests[1][1]) == b"<user>hi\n<assistant><u\n<user>hi\n<assistant>"


def test_chat_logprobs(client: openai.OpenAI, fleet: FakeFleet) -> None:
    fleet.text = "é"
    answer = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "hi"}],
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    # Two bytes of one character, and the end token.
    assert [entry.bytes for entry in logprobs.content] == [[0xC3], [0xA9], list(b"<eos>")]
    assert [entry.logprob for entry in logprobs.content] == [-0.5] * 3
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2, 2, 2]
    assert logprobs.content[0].top_logprobs[1].logprob == -1.5


def test_chat_stream(client: openai.OpenAI, fleet: FakeFleet) -> None:
    fleet.text = "né 🙂"
    chunks = list(
        client.chat.completions.create(
            model="chat",
            messages=[{"role": "user", "content": "hi"}],
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        assert "\ufffd" not in (choice.delta.content or "")
    assert texts == {0: "né 🙂", 1: "né 🙂"}
    roles = [chunk.choices[0].delta.role for chunk in chunks[:2]]
    assert roles == ["assistant", "assistant"]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert sorted(filter(None, reasons)) == ["stop", "stop"]
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 2 * len("né 🙂".encode()) + 2


def test_chat_stream_logprobs(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="chat",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=3,
            logprobs=True,
            stream=True,
        )
    )
    entries = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [entry.token for entry in entries] == ["<", "u", "s"]
    assert all(entry.top_logprobs == [] for entry in entries)


def test_errors_raise_the_exceptions_of_the_client(client: openai.OpenAI, fleet: FakeFleet) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature must be a number") as cold:
        client.completions.create(model="chat", prompt="a", temperature=-1)
    assert cold.value.param == "temperature"
    assert cold.value.type == "invalid_request_error"
    fleet.dead = "the engine's loop has ended"
    with pytest.raises(openai.InternalServerError, match="loop has ended") as dead:
        client.completions.create(model="chat", prompt="a")
    assert dead.value.status_code == 503


@pytest.mark.parametrize("n", [1, 2])
def test_an_engine_failure_during_generation_raises(
    client: openai.OpenAI, fleet: FakeFleet, n: int
) -> None:
    fleet.die_after = 2
    with pytest.raises(openai.InternalServerError, match="out of memory") as dead:
        client.completions.create(model="chat", prompt="a", max_tokens=5, n=n)
    assert dead.value.status_code == 503
    stream = client.completions.create(model="chat", prompt="a", max_tokens=5, n=n, stream=True)
    with pytest.raises(openai.APIError, match="out of memory"):
        list(stream)
    # The client may see the end before the server has released the streams.
    wait_until(lambda: not fleet.active)


def test_concurrent_requests_get_their_own_outputs(server: str, fleet: FakeFleet) -> None:
    fleet.delay = 0.002

    async def complete(client: openai.AsyncOpenAI, index: int) -> str:
        model = ("chat", "plain/base")[index % 2]
        prompt = f"<{index}>"
        if index % 3:
            answer = await client.completions.create(model=model, prompt=prompt, max_tokens=30)
            return answer.choices[0].text
        stream = await client.completions.create(
            model=model, prompt=prompt, max_tokens=30, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def complete_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as client:
            return await asyncio.gather(*(complete(client, index) for index in range(40)))

    for index, text in enumerate(asyncio.run(complete_all())):
        assert text == (f"<{index}>" * 30)[:30]
    wait_until(lambda: not fleet.active)
