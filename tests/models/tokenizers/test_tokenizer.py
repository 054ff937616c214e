"""Decoding, at once and as a stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxjax.errors import CheckpointError, InvalidRequest
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from muxjax.models.tokenizers.tokenizer import Tokenizer

BYTES = byte_tokenizer(300)


def spaced_tokenizer() -> Tokenizer:
    pieces = [b"<s>", b"</s>", b" hello", b" ", b"hello", "é".encode()[:1], "é".encode()[1:]]
    return Tokenizer(
        lambda text, special: [],
        pieces,
        special_ids=frozenset((0, 1)),
        bos_token_id=0,
        eos_token_ids=(1,),
        adds_space_prefix=True,
    )


@given(st.lists(st.integers(0, 299), max_size=40), st.data())
def test_stream_equals_decoding_at_once(ids: list[int], data: st.DataObject) -> None:
    stream = BYTES.decode_stream()
    texts = []
    remaining = ids
    while remaining:
        size = data.draw(st.integers(1, len(remaining)))
        texts.append(stream.push(remaining[:size]))
        remaining = remaining[size:]
    texts.append(stream.flush())
    assert "".join(texts) == BYTES.decode(ids)


@given(st.text(max_size=20))
def test_stream_emits_complete_characters_only(text: str) -> None:
    ids = BYTES.encode(text)
    stream = BYTES.decode_stream()
    texts = [stream.push([token]) for token in ids]
    assert stream.flush() == ""
    assert "".join(texts) == text == BYTES.decode(ids)
    assert all(len(piece) <= 1 for piece in texts)


def test_invalid_utf8_becomes_replacement_characters() -> None:
    stream = BYTES.decode_stream()
    assert stream.push([0xC3]) == ""
    assert stream.push([0x41]) == "\ufffdA"
    assert stream.push([0xE6, 0xBC]) == ""
    assert stream.flush() == "\ufffd"


def test_special_tokens_have_a_name_and_no_text() -> None:
    tokenizer = spaced_tokenizer()
    assert tokenizer.decode([2, 1]) == " hello"
    assert tokenizer.token_text(1) == "</s>"
    assert tokenizer.token_bytes(5) == b"\xc3"
    assert tokenizer.token_text(5) == "\ufffd"
    assert tokenizer.token_bytes(99) == b""
    assert tokenizer.vocab_size == 7


def test_space_prefix_is_removed_after_the_begin_token_only() -> None:
    tokenizer = spaced_tokenizer()
    assert tokenizer.decode([0, 2, 2]) == "hello hello"
    assert tokenizer.decode([0, 4, 2]) == "hello hello"
    assert tokenizer.decode([0, 1, 3, 3]) == " "
    assert tokenizer.decode([2, 2]) == " hello hello"
    assert tokenizer.decode([0, 5, 6]) == "é"


def test_invalid_unicode_is_rejected() -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode at character 2") as refused:
        BYTES.encode("ab\ud800")
    assert refused.value.field == "prompt"


def test_bytes_outside_of_the_vocabulary_are_rejected() -> None:
    tiny = byte_tokenizer(128)
    assert tiny.encode("az") == [97, 122]
    assert tiny.decode([97, 122]) == "az"
    with pytest.raises(
        InvalidRequest, match="byte 195 is outside of the model's vocabulary of 128"
    ):
        tiny.encode("é")


def test_missing_chat_template_is_reported() -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as refused:
        BYTES.apply_chat([{"role": "user", "content": "hi"}])
    assert refused.value.field == "messages"


def test_tokenizer_without_files_is_reported() -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        spaced_tokenizer().files()
