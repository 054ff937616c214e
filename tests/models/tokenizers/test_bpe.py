"""Merges from scores, and the tokenizers built from them, against reference implementations."""

from __future__ import annotations

import itertools
import string

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from muxjax.models.tokenizers import bpe


def test_bytes_of_byte_level_pieces() -> None:
    assert len(bpe.byte_alphabet()) == 256
    assert sorted(bpe.byte_alphabet().values()) == list(range(256))
    pieces = ["Ġhello", "ĠĊ", "Ã©", "漢", "<Ã©>"]
    expected = [b" hello", b" \n", "é".encode(), "漢".encode(), "<Ã©>".encode()]
    assert bpe.byte_level_bytes(pieces, {4}) == expected


def test_byte_alphabet_equals_the_library() -> None:
    assert set(bpe.byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_bytes_of_sentencepiece_pieces() -> None:
    pieces = ["▁hello▁", "<0x0A>", "<0x0A>x", "é", "<0x0A>"]
    expected = [b" hello ", b"\n", b"<0x0A>x", "é".encode(), b"<0x0A>"]
    assert bpe.sentencepiece_bytes(pieces, {4}) == expected


def test_merges_are_ranked_by_the_score_of_their_result() -> None:
    pieces = ["a", "b", "c", "ab", "bc", "abc", "<s>"]
    scores = [0.0, 0.0, 0.0, -2.0, -1.0, -3.0, 0.0]
    assert bpe.merges_from_scores(pieces, scores, {6}) == [
        ("b", "c"),
        ("a", "b"),
        ("a", "bc"),
        ("ab", "c"),
    ]
    assert bpe.merges_from_scores(pieces, scores, {4}) == [("a", "b"), ("ab", "c")]


LETTERS = "abc"
PIECES = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), bpe.SPACE, *LETTERS]
PIECES += [f"{bpe.SPACE}a", "ab", "bc", f"{bpe.SPACE}ab", "abc", "cc", "ccc", "cab", "bb", "bcb"]
SCORES = [0.0] * (258 + 4) + [-float(rank) for rank in (3, 1, 0, 6, 5, 2, 7, 4, 9, 8)]


def merge_best_pairs(text: str) -> list[str]:
    """Reference for SentencePiece's BPE: merges the best-scored neighbors, leftmost first."""
    ids = {piece: index for index, piece in enumerate(PIECES)}
    parts = list(bpe.SPACE + text.replace(" ", bpe.SPACE))
    while True:
        joined = [left + right for left, right in itertools.pairwise(parts)]
        known = [(-SCORES[ids[piece]], at) for at, piece in enumerate(joined) if piece in ids]
        if not known:
            break
        at = min(known)[1]
        parts[at : at + 2] = [joined[at]]
    out = []
    for part in parts:
        out += [part] if part in ids else [f"<0x{byte:02X}>" for byte in part.encode()]
    return out


@given(st.text(alphabet=LETTERS + " é", min_size=1, max_size=30))
def test_sentencepiece_bpe_equals_the_reference(text: str) -> None:
    backend = _sentencepiece()
    assert backend.encode(text).tokens == merge_best_pairs(text)


def _sentencepiece(cache: list[tokenizers.Tokenizer] = []) -> tokenizers.Tokenizer:  # noqa: B006
    if not cache:
        cache.append(
            bpe.sentencepiece_bpe(
                PIECES, SCORES, control=(0, 1), user_defined=(), unknown_id=0, add_space=True
            )
        )
    return cache[0]


def test_names_of_tokens_in_a_text_are_matched() -> None:
    pieces = ["<s>", bpe.SPACE, "a", "\n\n", "  ", f"{bpe.SPACE}a"]
    backend = bpe.sentencepiece_bpe(
        pieces,
        [0.0, 0.0, 0.0, 0.0, 0.0, -1.0],
        control=(0,),
        user_defined=(3, 4),
        unknown_id=None,
        add_space=False,
    )
    assert backend.encode("a<s>a\n\n  a a").ids == [2, 0, 2, 3, 4, 2, 5]


def test_byte_level_patterns_apply_in_turn() -> None:
    alphabet = sorted(bpe.byte_alphabet(), key=bpe.byte_alphabet().__getitem__)
    pieces = [*alphabet, "12", "ab", "Ġa", "<end>"]
    backend = bpe.byte_level_bpe(
        pieces,
        [("1", "2"), ("a", "b"), ("Ġ", "a")],
        (r"\p{N}", r" ?\p{L}+"),
        control=(259,),
        user_defined=(),
    )
    assert backend.encode("ab12 a<end>").tokens == ["ab", "1", "2", "Ġa", "<end>"]


def test_ignore_merges() -> None:
    alphabet = sorted(bpe.byte_alphabet(), key=bpe.byte_alphabet().__getitem__)
    for ignore_merges, tokens in ((True, ["abc"]), (False, ["ab", "c"])):
        backend = bpe.byte_level_bpe(
            [*alphabet, "ab", "abc"],
            [("a", "b")],
            (r"\p{L}+",),
            control=(),
            user_defined=(),
            ignore_merges=ignore_merges,
        )
        assert backend.encode("abc").tokens == tokens


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [(0, None, [0, 2]), (None, 1, [2, 1]), (0, 1, [0, 2, 1]), (None, None, [2])],
)
def test_begin_and_end_tokens(begin: int | None, end: int | None, expected: list[int]) -> None:
    pieces = ["<s>", "</s>", *string.ascii_lowercase]
    backend = bpe.sentencepiece_bpe(
        pieces,
        [0.0] * len(pieces),
        control=(0, 1),
        user_defined=(),
        unknown_id=None,
        add_space=False,
    )
    bpe.add_bos_and_eos(backend, {0: "<s>", 1: "</s>"}, begin, end)
    assert backend.encode("a").ids == expected
    assert backend.encode("a", add_special_tokens=False).ids == [2]
