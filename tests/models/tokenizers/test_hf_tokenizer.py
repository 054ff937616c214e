"""tokenizer.json and the files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models

from muxjax.errors import CheckpointError
from muxjax.models.tokenizers import bpe
from muxjax.models.tokenizers.hf_tokenizer import read_tokenizer
from muxjax.models.tokenizers.tokenizer import Tokenizer

PIECES = ["<unk>", "<s>", "</s>", bpe.SPACE, "h", "i", "hi", f"{bpe.SPACE}hi", "<tool>"]
SCORES = [0.0] * 6 + [-1.0, -2.0, 0.0]


def write(folder: Path, settings: dict[str, Any] | None = None, **options: Any) -> None:
    backend = bpe.sentencepiece_bpe(
        PIECES,
        SCORES,
        control=(0, 1, 2),
        user_defined=(8,),
        unknown_id=0,
        add_space=options.get("add_space", True),
    )
    if options.get("begin", True):
        bpe.add_bos_and_eos(backend, dict(enumerate(PIECES)), 1, None)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | (settings or {})))


def read(folder: Path) -> Tokenizer:
    tokenizer = read_tokenizer(folder, (5,))
    assert tokenizer is not None
    return tokenizer


def test_llama2_tokenizer(tmp_path: Path) -> None:
    write(tmp_path)
    tokenizer = read(tmp_path)
    assert tokenizer.encode("hi hi") == [1, 7, 7]
    assert tokenizer.encode("hi", add_special=False) == [7]
    assert tokenizer.decode([1, 7, 7]) == "hi hi"
    assert tokenizer.decode([7]) == " hi"
    assert tokenizer.decode([7, 8, 2]) == " hi<tool>"
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (5, 2)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_tokenizer_without_space_prefix(tmp_path: Path) -> None:
    write(tmp_path, add_space=False)
    tokenizer = read(tmp_path)
    assert tokenizer.encode("hi hi") == [1, 6, 7]
    assert tokenizer.decode([1, 7]) == " hi"


@pytest.mark.parametrize("begin", [True, False])
def test_add_bos_token_overrides_the_post_processor(begin: bool, tmp_path: Path) -> None:
    write(tmp_path, {"add_bos_token": True}, begin=begin)
    assert read(tmp_path).encode("hi") == [1, 7]
    write(tmp_path, {"add_bos_token": False}, begin=begin)
    assert read(tmp_path).encode("hi") == [7]
    assert read(tmp_path).encode("<s>hi")[0] == 1  # in the text


def test_sources_of_chat_templates(tmp_path: Path) -> None:
    write(tmp_path)
    assert read(tmp_path).chat_template is None
    write(tmp_path, {"chat_template": "A"})
    assert read(tmp_path).chat_template == "A"
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    write(tmp_path, {"chat_template": named})
    assert read(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J{{ eos_token }}")
    assert read(tmp_path).apply_chat([]) == "J</s>"


def test_special_tokens_map_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert read(tmp_path).eos_token_ids == (5, 2)
    assert read(tmp_path).bos_token_id is None


def test_files_round_trip(tmp_path: Path) -> None:
    write(tmp_path, {"chat_template": "x"})
    first = read(tmp_path)
    for name, text in first.files().items():
        (tmp_path / name).write_text(text, "utf-8")
    reread = read(tmp_path)
    assert reread.encode("hi <tool> hi") == first.encode("hi <tool> hi")
    assert reread.pieces == first.pieces
    assert reread.chat_template == "x"


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer.model without tokenizer.json"):
        read_tokenizer(tmp_path)


def test_invalid_files_are_rejected(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: not JSON"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: "):
        read_tokenizer(tmp_path)


def test_unknown_decoder_is_rejected(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"unknown decoder \(WordPiece\)"):
        read_tokenizer(tmp_path)
