"""Bytes as tokens, also when written as tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muxjax.errors import CheckpointError
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from muxjax.models.tokenizers.hf_tokenizer import read_tokenizer

TEXT = "Hello\n  wörld 🙂\t123"


def test_files_mean_the_same(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(256)
    for name, text in tokenizer.files().items():
        (tmp_path / name).write_text(text, "utf-8")
    again = read_tokenizer(tmp_path)
    assert again is not None
    assert again.encode(TEXT) == tokenizer.encode(TEXT) == list(TEXT.encode())
    assert again.decode(again.encode(TEXT)) == TEXT
    assert again.pieces == tokenizer.pieces
    assert json.loads(again.files()["tokenizer.json"])["model"]["type"] == "BPE"


def test_a_smaller_vocabulary_has_no_files() -> None:
    with pytest.raises(CheckpointError, match="needs all 256 bytes"):
        byte_tokenizer(128).files()


def test_a_larger_vocabulary_has_ids_without_text() -> None:
    tokenizer = byte_tokenizer(1000)
    assert tokenizer.vocab_size == 1000
    assert tokenizer.decode([104, 999, 105]) == "hi"
