"""Tokenizers from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.tokenizers import bpe
from muxjax.models.tokenizers.hf_tokenizer import tokenizer_files
from muxjax.models.tokenizers.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_END_NAMES = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "<|end_of_text|>")
"""Control tokens that end an output in addition to the end tokens of the metadata."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class _PreTokenizer:
    """The steps of a byte-level tokenizer before merging; `tokenizer.ggml.pre` names them."""

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_DIGITS_GPT2 = _PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3_PRE = _PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)
_QWEN2_PRE = _PreTokenizer((_QWEN2,), nfc=True)
PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    "gpt-2": _PreTokenizer((_GPT2,)),
    "smollm": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "qwen2": _QWEN2_PRE,
    "deepseek-r1-qwen": _PreTokenizer((_QWEN2,), adds_bos=True),
}


def tokenizer_from_gguf(metadata: Mapping[str, Any], origin: str) -> Tokenizer | None:
    """Builds the tokenizer of a GGUF file; None if the file has none.

    Args:
      metadata: the file's metadata.
      origin: the file's source, for messages.

    Raises:
      CheckpointError: the tokenizer's kind is unknown, or the metadata are inconsistent.
    """
    kind = metadata.get(_PREFIX + "model", "no_vocab")
    if kind in ("no_vocab", "none"):
        return None
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{origin}: unknown tokenizer {kind!r}; known: gpt2, llama")
    pieces: list[str] = metadata.get(_PREFIX + "tokens", [])
    types = np.asarray(metadata.get(_PREFIX + "token_type", [_NORMAL] * len(pieces)))
    if not pieces or len(types) != len(pieces):
        raise CheckpointError(f"{origin}: {len(pieces)} tokens with {len(types)} types")
    control = np.flatnonzero((types == _CONTROL) | (types == _UNKNOWN)).tolist()
    user_defined = np.flatnonzero(types == _USER_DEFINED).tolist()
    special = {"control": control, "user_defined": user_defined}
    if kind == "llama":
        scores = metadata.get(_PREFIX + "scores")
        if scores is None or len(scores) != len(pieces):
            raise CheckpointError(
                f"{origin}: the tokenizer needs a score for each of {len(pieces)} tokens"
            )
        adds_space_prefix = bool(metadata.get(_PREFIX + "add_space_prefix", True))
        backend = bpe.sentencepiece_bpe(
            pieces,
            np.asarray(scores).tolist(),
            unknown_id=_id(metadata, "unknown"),
            add_space=adds_space_prefix,
            **special,
        )
        adds_bos, to_bytes = True, bpe.sentencepiece_bytes
    else:
        adds_space_prefix = False
        pre = _pre_tokenizer(metadata, origin)
        merges = [tuple(merge.split(" ", 1)) for merge in metadata.get(_PREFIX + "merges", [])]
        backend = bpe.byte_level_bpe(
            pieces,
            merges,
            pre.patterns,
            nfc=pre.nfc,
            ignore_merges=pre.ignore_merges,
            **special,
        )
        adds_bos, to_bytes = pre.adds_bos, bpe.byte_level_bytes
    bos, eos = _id(metadata, "bos"), _id(metadata, "eos")
    for index in (bos, eos, _id(metadata, "unknown")):
        if index is not None and not 0 <= index < len(pieces):
            raise CheckpointError(
                f"{origin}: token id {index} is outside of the {len(pieces)} tokens"
            )
    bpe.add_bos_and_eos(
        backend,
        {index: pieces[index] for index in (bos, eos) if index is not None},
        bos if metadata.get(_PREFIX + "add_bos_token", adds_bos) else None,
        eos if metadata.get(_PREFIX + "add_eos_token", False) else None,
    )
    template = metadata.get("tokenizer.chat_template")
    ends = (("bos_token", bos), ("eos_token", eos))
    names = {name: pieces[index] for name, index in ends if index is not None}
    return Tokenizer(
        encode_text=lambda text, add_special: (
            backend.encode(text, add_special_tokens=add_special).ids
        ),
        pieces=to_bytes(pieces, {*control, *user_defined}),
        special_ids=frozenset(control),
        bos_token_id=bos,
        eos_token_ids=end_token_ids(metadata),
        chat_template=template,
        special_tokens=names,
        adds_space_prefix=adds_space_prefix,
        to_files=lambda: tokenizer_files(backend, names, template),
    )


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end an output: those in the metadata, and well-known control tokens."""
    ids = [_id(metadata, name) for name in ("eos", "eot", "eom")]
    pieces = metadata.get(_PREFIX + "tokens", [])
    types = metadata.get(_PREFIX + "token_type", [])
    control = {pieces[index]: int(index) for index in np.flatnonzero(np.asarray(types) == _CONTROL)}
    ids += [control[name] for name in _END_NAMES if name in control]
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def _id(metadata: Mapping[str, Any], name: str) -> int | None:
    value = metadata.get(f"{_PREFIX}{name}_token_id")
    return None if value is None else int(value)


def _pre_tokenizer(metadata: Mapping[str, Any], origin: str) -> _PreTokenizer:
    name = metadata.get(_PREFIX + "pre", "gpt-2")
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{origin}: unknown pre-tokenizer {name!r}; known: {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]
