"""A tokenizer without a vocabulary: one token per byte."""

from __future__ import annotations

from muxjax.errors import CheckpointError, InvalidRequest
from muxjax.models.tokenizers import bpe
from muxjax.models.tokenizers.hf_tokenizer import tokenizer_files
from muxjax.models.tokenizers.tokenizer import Tokenizer


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with one token per byte, for models with random weights and tiny trained models.

    Ids from 256 on have no text. With fewer than 256 ids, encoding a byte outside of the vocabulary
    raises InvalidRequest.
    """

    def encode(text: str, add_special: bool) -> list[int]:
        ids = list(text.encode("utf-8"))
        if max(ids, default=0) >= vocab_size:
            raise InvalidRequest(
                f"byte {max(ids)} is outside of the model's vocabulary of {vocab_size} tokens",
                field="prompt",
            )
        return ids

    def to_files() -> dict[str, str]:
        if vocab_size < 256:
            raise CheckpointError(f"tokenizer.json needs all 256 bytes, not {vocab_size}")
        alphabet = sorted(bpe.byte_alphabet(), key=bpe.byte_alphabet().__getitem__)
        backend = bpe.byte_level_bpe(alphabet, (), (), control=(), user_defined=())
        return tokenizer_files(backend, {}, None)

    pieces = [bytes([byte]) for byte in range(min(256, vocab_size))]
    return Tokenizer(encode, pieces + [b""] * (vocab_size - len(pieces)), to_files=to_files)
