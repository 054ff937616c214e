"""Tokenizers of the demo models against `transformers`, and invalid metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.tokenizers import bpe
from muxjax.models.tokenizers.gguf_tokenizer import end_token_ids, tokenizer_from_gguf
from muxjax.models.tokenizers.hf_tokenizer import read_tokenizer
from muxjax.models.tokenizers.tokenizer import Tokenizer
from tests import golden

NAMES = ("smollm2-135m", "gemma3-270m")
ASCII_LETTERS = sorted(bpe.byte_alphabet(), key=bpe.byte_alphabet().__getitem__)


@pytest.fixture(params=NAMES)
def case(
    request: pytest.FixtureRequest, demo_checkpoint: Callable[[str], Checkpoint]
) -> tuple[str, Tokenizer]:
    tokenizer = demo_checkpoint(request.param).tokenizer
    assert tokenizer is not None
    return request.param, tokenizer


def test_ids_equal_transformers(case: tuple[str, Tokenizer]) -> None:
    name, tokenizer = case
    for text, ids in golden.tokenizer_cases(name):
        assert tokenizer.encode(text) == ids, text


def test_decode_inverts_encode(case: tuple[str, Tokenizer]) -> None:
    name, tokenizer = case
    for text, ids in golden.tokenizer_cases(name):
        if not any(token in tokenizer.special_ids for token in ids[1:]):
            assert tokenizer.decode(ids) == text
            stream = tokenizer.decode_stream()
            assert "".join(stream.push([token]) for token in ids) + stream.flush() == text


def test_begin_tokens(case: tuple[str, Tokenizer]) -> None:
    name, tokenizer = case
    begin = [2] if name == "gemma3-270m" else []
    assert tokenizer.encode("") == begin
    assert tokenizer.encode("hi") == begin + tokenizer.encode("hi", add_special=False)


def test_end_tokens_and_names(demo_checkpoint: Callable[[str], Checkpoint]) -> None:
    smollm2 = demo_checkpoint("smollm2-135m")
    assert smollm2.config.eos_token_ids == (2, 0)  # <|im_end|>, <|endoftext|>
    assert smollm2.tokenizer is not None
    assert smollm2.tokenizer.token_text(2) == "<|im_end|>"
    assert smollm2.tokenizer.vocab_size == smollm2.config.vocab_size == 49152
    gemma = demo_checkpoint("gemma3-270m")
    assert gemma.config.eos_token_ids == (1, 106)  # <eos>, <end_of_turn>
    assert gemma.tokenizer is not None
    assert gemma.tokenizer.vocab_size == gemma.config.vocab_size == 262144
    assert gemma.tokenizer.chat_template is None  # a base model


def test_files_round_trip(demo_checkpoint: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    tokenizer = demo_checkpoint("smollm2-135m").tokenizer
    assert tokenizer is not None
    for name, text in tokenizer.files().items():
        (tmp_path / name).write_text(text, "utf-8")
    reread = read_tokenizer(tmp_path)
    assert reread is not None
    for text, ids in golden.tokenizer_cases("smollm2-135m"):
        assert reread.encode(text) == ids
    assert reread.pieces == tokenizer.pieces
    assert reread.special_ids == tokenizer.special_ids
    messages, prompt = golden.chat_case()
    assert reread.apply_chat(messages) == prompt


def byte_level(**changes: Any) -> dict[str, Any]:
    pieces = [*ASCII_LETTERS, "<|begin|>", "<|eot_id|>", "ab"]
    types = np.ones(len(pieces), np.int32)
    types[256:258] = 3
    metadata: dict[str, Any] = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": pieces,
        "token_type": types,
        "merges": ["a b"],
        "bos_token_id": 256,
        "eos_token_id": 256,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def test_llama3_files_add_the_begin_token() -> None:
    tokenizer = tokenizer_from_gguf(byte_level(), "file")
    assert tokenizer is not None
    assert tokenizer.encode("ab") == [256, 258]
    assert tokenizer.eos_token_ids == (256, 257)
    plain = tokenizer_from_gguf(byte_level(add_bos_token=False), "file")
    assert plain is not None
    assert plain.encode("ab") == [258]
    ended = tokenizer_from_gguf(byte_level(add_eos_token=True, eos_token_id=257), "file")
    assert ended is not None
    assert ended.encode("ab") == [256, 258, 257]


def test_qwen2_files_compose_characters_first() -> None:
    composed = tokenizer_from_gguf(byte_level(pre="qwen2"), "file")
    assert composed is not None
    assert composed.decode(composed.encode("e\u0301")) == "é"


def test_end_token_ids_are_unique() -> None:
    metadata = byte_level(eot_token_id=257, eom_token_id=5)
    assert end_token_ids(metadata) == (256, 257, 5)
    assert end_token_ids({}) == ()


def test_files_without_a_tokenizer() -> None:
    assert tokenizer_from_gguf({}, "file") is None
    assert tokenizer_from_gguf({"tokenizer.ggml.model": "no_vocab"}, "file") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "file: unknown tokenizer 'bert'; known: gpt2, llama"),
        ({"pre": "tekken"}, "file: unknown pre-tokenizer 'tekken'; known: gpt-2, smollm"),
        ({"token_type": np.ones(3)}, "259 tokens with 3 types"),
        ({"bos_token_id": 300}, "token id 300 is outside of the 259 tokens"),
        ({"model": "llama"}, "needs a score for each of"),
    ],
)
def test_invalid_metadata_is_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_gguf(byte_level(**changes), "file")
