"""Prompt lengths with each kind of token counter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from muxjax.bench.http.client import Server
from muxjax.bench.http.prompts import SAFE_IDS, build_prompt_generator
from muxjax.errors import BenchError
from tests.muxjax.bench.servers import serving


def no_tokenize(path: str, body: Any) -> tuple[int, list[bytes]]:
    return 404, [b'{"detail": "Not Found"}']


def tokenize(path: str, body: Any) -> tuple[int, list[bytes]]:
    """Counts two tokens per word, and one per single character."""
    assert (path, body["add_special_tokens"]) == ("/tokenize", False)
    count = sum(1 if len(word) == 1 else 2 for word in body["prompt"].split())
    ids = ",".join(str(index) for index in range(count))
    return 200, [f'{{"tokens": [{ids}]}}'.encode()]


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with httpx2.Client() as client:
        yield client


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A tokenizer whose tokens are bytes."""
    tokenizer = Tokenizer(models.BPE({chr(i): i for i in range(33, 127)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_token_ids_without_a_tokenizer(client: httpx2.Client) -> None:
    with serving(no_tokenize) as url:
        generator = build_prompt_generator(client, Server(url), "m", seed=1)
        same_seed = build_prompt_generator(client, Server(url), "m", seed=1)
        other = build_prompt_generator(client, Server(url), "n", seed=1)
    prompt = generator.generate(50)
    assert generator.counted_by == "token ids"
    assert len(prompt) == 50
    assert set(prompt) <= set(SAFE_IDS)
    assert same_seed.generate(50) == prompt
    assert other.generate(50) != prompt


def test_words_count_as_tokens_of_chats_without_a_tokenizer(client: httpx2.Client) -> None:
    with serving(no_tokenize) as url:
        generator = build_prompt_generator(client, Server(url, "openai-chat"), "m", seed=1)
    assert generator.counted_by == "words"
    prompt = generator.generate(7)
    assert isinstance(prompt, str)
    assert len(prompt.split()) == generator.count(prompt) == 7


def test_tokens_are_counted_by_the_server(client: httpx2.Client) -> None:
    with serving(tokenize) as url:
        ids = build_prompt_generator(client, Server(url), "m", seed=1)
        assert (ids.counted_by, len(ids.generate(33))) == ("server", 33)
        text = build_prompt_generator(client, Server(url, "openai-chat"), "m", seed=1)
        for tokens in (1, 8, 9):  # odd numbers need a filler
            prompt = text.generate(tokens)
            assert isinstance(prompt, str)
            assert text.count(prompt) == max(2, tokens)  # a word has two tokens


def test_tokens_are_counted_by_a_tokenizer(client: httpx2.Client, tokenizer_file: Path) -> None:
    for path in (tokenizer_file, tokenizer_file / "tokenizer.json"):
        generator = build_prompt_generator(
            client, Server("http://127.0.0.1:1", "openai-chat"), "m", seed=0, tokenizer=path
        )
        assert generator.counted_by == "tokenizer"
        assert generator.count(str(generator.generate(41))) == 41


def test_an_unreadable_tokenizer_is_an_error(client: httpx2.Client, tmp_path: Path) -> None:
    server = Server("http://127.0.0.1:1")
    with pytest.raises(BenchError, match=r"no tokenizer\.json"):
        build_prompt_generator(client, server, "m", seed=0, tokenizer=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BenchError, match="--tokenizer"):
        build_prompt_generator(client, server, "m", seed=0, tokenizer=tmp_path)
