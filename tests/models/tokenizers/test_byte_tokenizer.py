"""The byte tokenizer, and its tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muxjax.errors import CheckpointError
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from muxjax.models.tokenizers.hf_tokenizer import read_tokenizer

TEXT = "Hello\n  wörld 🙂\t123"


def test_files_round_trip(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(256)
    for name, text in tokenizer.files().items():
        (tmp_path / name).write_text(text, "utf-8")
    reread = read_tokenizer(tmp_path)
    assert reread is not None
    assert reread.encode(TEXT) == tokenizer.encode(TEXT) == list(TEXT.encode())
    assert reread.decode(reread.encode(TEXT)) == TEXT
    assert reread.pieces == tokenizer.pieces
    assert json.loads(reread.files()["tokenizer.json"])["model"]["type"] == "BPE"


def test_smaller_vocabulary_has_no_files() -> None:
    with pytest.raises(CheckpointError, match="needs all 256 bytes"):
        byte_tokenizer(128).files()


def test_larger_vocabulary_has_ids_without_text() -> None:
    tokenizer = byte_tokenizer(1000)
    assert tokenizer.vocab_size == 1000
    assert tokenizer.decode([104, 999, 105]) == "hi"
