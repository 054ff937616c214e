"""Builds `tokenizers` objects for the two kinds of byte-pair (BPE) vocabularies.

Byte-level (GPT-2): regular expressions split the text, and each part's bytes, written as printable
characters, are merged. SentencePiece: spaces become U+2581, characters are merged by the scores of
the resulting pieces, and characters without a piece become byte tokens `<0xNN>`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

SPACE = "\u2581"
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters, and letters from U+0100 for other bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return letters


def byte_level_bytes(pieces: Sequence[str], literal: Collection[int]) -> list[bytes]:
    """The bytes of byte-level pieces, by id.

    Pieces with ids in `literal` (added tokens), and pieces outside of the alphabet, are encoded in
    UTF-8.
    """
    # One call per vocabulary, since tests check the types of every call.
    letters = byte_alphabet()
    return [
        piece.encode("utf-8")
        if index in literal or not all(letter in letters for letter in piece)
        else bytes(letters[letter] for letter in piece)
        for index, piece in enumerate(pieces)
    ]


def sentencepiece_bytes(pieces: Sequence[str], literal: Collection[int]) -> list[bytes]:
    """The bytes of SentencePiece pieces, by id; ids in `literal` are encoded in UTF-8."""
    return [
        piece.encode("utf-8")
        if index in literal
        else bytes([int(byte[1], 16)])
        if (byte := BYTE_PIECE.fullmatch(piece))
        else piece.replace(SPACE, " ").encode("utf-8")
        for index, piece in enumerate(pieces)
    ]


def merges_from_scores(
    pieces: Sequence[str], scores: Sequence[float], skipped: Collection[int]
) -> list[tuple[str, str]]:
    """The merges implied by SentencePiece's scores, in order of application.

    SentencePiece merges the two adjacent pieces whose concatenation has the best score. Every split
    of a piece into two other pieces is therefore a merge, ranked by the score of the piece. Splits
    of the same piece are ordered by the ids of their parts.

    Args:
      pieces: the vocabulary.
      scores: each piece's score; higher scores merge earlier.
      skipped: ids that merging never produces (control, byte and user-defined tokens).
    """
    ids = {piece: index for index, piece in enumerate(pieces) if index not in skipped}
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece in ids:
        splits = [
            (ids[piece[:i]], ids[piece[i:]], piece[:i], piece[i:])
            for i in range(1, len(piece))
            if piece[:i] in ids and piece[i:] in ids
        ]
        if splits:
            score = -scores[ids[piece]]
            ranked += [(score, left, right, first, second) for left, right, first, second in splits]
    ranked.sort()
    return [(first, second) for *_, first, second in ranked]


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    control: Collection[int],
    user_defined: Collection[int],
    unknown_id: int | None,
    add_space: bool,
) -> Tokenizer:
    """A `tokenizers` tokenizer equivalent to SentencePiece with a BPE vocabulary.

    Args:
      pieces: the vocabulary.
      scores: each piece's score; higher scores merge earlier.
      control: ids of control tokens, which are matched by name in the text and decode to nothing.
      user_defined: ids of tokens that are matched by name in the text before merging.
      unknown_id: id of the token for characters that neither pieces nor byte tokens can express.
      add_space: prepend a space to every text (Llama 2; not Gemma).
    """
    bytes_ = {index for index, piece in enumerate(pieces) if BYTE_PIECE.fullmatch(piece)}
    skipped = {*control, *user_defined, *bytes_}
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges_from_scores(pieces, scores, skipped),
            unk_token=None if unknown_id is None else pieces[unknown_id],
            fuse_unk=True,
            byte_fallback=bool(bytes_),
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    if add_space:
        steps.insert(0, normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    # For other programs that read saved tokenizers; MuxJAX's `Tokenizer` does not use the decoder.
    undo: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if add_space:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    # As in SentencePiece, names are matched after spaces have become U+2581, so names with spaces
    # match. With a prepended space this is impossible: it would be prepended to the names too.
    add_tokens(tokenizer, pieces, control, user_defined, match_normalized=not add_space)
    return tokenizer


def byte_level_bpe(
    pieces: Sequence[str],
    merges: Sequence[tuple[str, str]],
    patterns: Sequence[str],
    *,
    control: Collection[int],
    user_defined: Collection[int],
    nfc: bool = False,
    ignore_merges: bool = False,
) -> Tokenizer:
    """A byte-level BPE tokenizer.

    Args:
      pieces: the vocabulary.
      merges: pairs of pieces, in order of application.
      patterns: regular expressions that split the text, applied in turn; matches and the text
        between them become separate parts.
      control: as in `sentencepiece_bpe`.
      user_defined: as in `sentencepiece_bpe`.
      nfc: whether to normalize the text to NFC first.
      ignore_merges: whether a part that is in the vocabulary becomes one token without merging.
    """
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=list(merges),
            ignore_merges=ignore_merges,
        )
    )
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    add_tokens(tokenizer, pieces, control, user_defined)
    return tokenizer


def add_tokens(
    tokenizer: Tokenizer,
    pieces: Sequence[str],
    control: Collection[int],
    user_defined: Collection[int],
    *,
    match_normalized: bool = False,
) -> None:
    """Adds tokens that are matched by name anywhere in a text.

    Args:
      tokenizer: changed in place.
      pieces: the vocabulary.
      control: as in `sentencepiece_bpe`.
      user_defined: as in `sentencepiece_bpe`.
      match_normalized: match user-defined tokens after the normalizer.
    """
    tokenizer.add_special_tokens(
        [AddedToken(pieces[index], normalized=False, special=True) for index in sorted(control)]
    )
    tokenizer.add_tokens(
        [AddedToken(pieces[index], normalized=match_normalized) for index in sorted(user_defined)]
    )


def add_bos_and_eos(
    tokenizer: Tokenizer, names: Mapping[int, str], bos: int | None, eos: int | None
) -> None:
    """Sets the tokens that encoding with special tokens adds before and after the text.

    Args:
      tokenizer: changed in place.
      names: the tokens' names by id.
      bos: id of the token before the text, or None.
      eos: id of the token after the text, or None.
    """
    ids = [index for index in (bos, eos) if index is not None]
    if not ids:
        return
    template = ([names[bos]] if bos is not None else []) + ["$A"]
    template += [names[eos]] if eos is not None else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(names[index], index) for index in ids]
    )
