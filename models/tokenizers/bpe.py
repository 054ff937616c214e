"""Builds `tokenizers` objects for the two kinds of byte-pair vocabularies.

Byte-level (GPT-2's): text is cut by a regular expression, and each piece is merged from bytes,
written as printable characters. SentencePiece's: spaces become U+2581, characters are merged by the
scores of the pieces they make, and characters without a piece fall back to byte tokens `<0xNN>`.
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
    """GPT-2's alphabet: printable Latin-1 is itself, other bytes are letters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return letters


def byte_level_bytes(pieces: Sequence[str], literal: Collection[int]) -> list[bytes]:
    """The bytes of byte-level pieces, by id.

    Those whose ids are in `literal` (added tokens), and those outside of the alphabet, are their
    own UTF-8.
    """
    # Whole vocabularies at a time: a call for each of 262,144 pieces costs seconds where calls are
    # type-checked, as in the tests.
    letters = byte_alphabet()
    return [
        piece.encode("utf-8")
        if index in literal or not all(letter in letters for letter in piece)
        else bytes(letters[letter] for letter in piece)
        for index, piece in enumerate(pieces)
    ]


def sentencepiece_bytes(pieces: Sequence[str], literal: Collection[int]) -> list[bytes]:
    """The bytes of SentencePiece pieces, by id; those in `literal` are their own UTF-8."""
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
    """The merges that SentencePiece's scores imply, in the order in which they apply.

    SentencePiece merges the two neighbors whose joined piece has the best score. So every way to
    cut a piece into two other pieces is a merge, ranked by the whole piece's score; among cuts of
    one piece the order hardly matters, and is that of the parts' ids.

    Args:
      pieces: the vocabulary.
      scores: of each piece; higher merges earlier.
      skipped: ids that are never made by merging (control, byte and user-defined tokens).
    """
    ids = {piece: index for index, piece in enumerate(pieces) if index not in skipped}
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece in ids:
        cuts = [
            (ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in ids and piece[cut:] in ids
        ]
        if cuts:
            score = -scores[ids[piece]]
            ranked += [(score, left, right, first, second) for left, right, first, second in cuts]
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
    """A `tokenizers` tokenizer that does what SentencePiece does with a BPE vocabulary.

    Args:
      pieces: the vocabulary.
      scores: of each piece; higher merges earlier.
      control: ids whose names in the text become these tokens, and which have no text.
      user_defined: ids whose names in the text become these tokens before any merging.
      unknown_id: for what neither a piece nor byte tokens can express.
      add_space: put a space before every text (Llama 2; not Gemma).
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
    # Decoding is ours; the decoder is set for other programs that read the saved tokenizer.
    undo: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if add_space:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    # Matched after spaces have become U+2581, as SentencePiece does, so that runs of both are
    # found; a space put before the text would be put before the tokens' names as well.
    add_tokens(tokenizer, pieces, control, user_defined, normalized=not add_space)
    return tokenizer


def byte_level_bpe(
    pieces: Sequence[str],
    merges: Sequence[tuple[str, str]],
    cuts: Sequence[str],
    *,
    control: Collection[int],
    user_defined: Collection[int],
    nfc: bool = False,
    whole_pieces_first: bool = False,
) -> Tokenizer:
    """A byte-level BPE tokenizer.

    Args:
      pieces: the vocabulary.
      merges: pairs of pieces, in the order in which they apply.
      cuts: regular expressions that cut the text, one after another; matches and what is between
        them become pieces of their own.
      control: as in `sentencepiece_bpe`.
      user_defined: as in `sentencepiece_bpe`.
      nfc: compose characters first.
      whole_pieces_first: a cut that is in the vocabulary is one token, whatever the merges say.
    """
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=list(merges),
            ignore_merges=whole_pieces_first,
        )
    )
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts),
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
    normalized: bool = False,
) -> None:
    """Makes the names of these tokens become the tokens wherever they stand in a text."""
    tokenizer.add_special_tokens(
        [AddedToken(pieces[index], normalized=False, special=True) for index in sorted(control)]
    )
    tokenizer.add_tokens(
        [AddedToken(pieces[index], normalized=normalized) for index in sorted(user_defined)]
    )


def add_bos_and_eos(
    tokenizer: Tokenizer, names: Mapping[int, str], begin: int | None, end: int | None
) -> None:
    """Makes encoding with special tokens put these ids around the text."""
    around = [index for index in (begin, end) if index is not None]
    if not around:
        return
    template = ([names[begin]] if begin is not None else []) + ["$A"]
    template += [names[end]] if end is not None else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(names[index], index) for index in around]
    )
