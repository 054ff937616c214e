"""Reading and writing tokenizers in Hugging Face's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from muxjax.errors import CheckpointError
from muxjax.models.json_files import read_json
from muxjax.models.tokenizers import bpe
from muxjax.models.tokenizers.tokenizer import Tokenizer

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


def read_tokenizer(folder: Path, eos_token_ids: tuple[int, ...] = ()) -> Tokenizer | None:
    """Reads a folder's tokenizer; None if the folder has none.

    Args:
      folder: contains tokenizer.json, and optionally tokenizer_config.json,
        special_tokens_map.json and chat_template.jinja.
      eos_token_ids: end tokens in the model's config; the tokenizer's end token is added.

    Raises:
      CheckpointError: the folder has only a SentencePiece model, a file is invalid, or the kind of
        decoder is unknown.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise CheckpointError(
                f"{folder}: tokenizer.model without tokenizer.json: not supported"
            )
        return None
    contents = read_json(path)
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(contents))
    except Exception as error:  # the library raises no narrower type
        raise CheckpointError(f"{path}: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    settings = _settings(folder)
    names = {
        key: name
        for key in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (name := _token_name(settings.get(key))) is not None
    }
    bos = backend.token_to_id(names.get("bos_token", ""))
    eos = backend.token_to_id(names.get("eos_token", ""))
    template = _chat_template(folder, settings)
    kinds = list(_decoders(contents.get("decoder")))
    added = backend.get_added_tokens_decoder()
    ends = (*eos_token_ids, *(() if eos is None else (eos,)))
    return Tokenizer(
        encode_text=_encoder(backend, bos, settings.get("add_bos_token")),
        pieces=_to_bytes(kinds, path)(_pieces(backend), added),
        special_ids=frozenset(index for index, token in added.items() if token.special),
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        chat_template=template,
        special_tokens=names,
        adds_space_prefix=_adds_space_prefix(kinds),
        to_files=lambda: tokenizer_files(backend, names, template),
    )


def tokenizer_files(
    backend: tokenizers.Tokenizer, names: dict[str, str], template: str | None
) -> dict[str, str]:
    """Contents, by name, of the files that `read_tokenizer` and `transformers` read."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    if template is not None:
        settings["chat_template"] = template
    return {
        TOKENIZER_FILE: backend.to_str(),
        CONFIG_FILE: json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG_FILE):
        path = folder / name
        if path.is_file():
            settings |= read_json(path)
    return settings


def _token_name(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates, by name
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _encoder(
    backend: tokenizers.Tokenizer, bos: int | None, adds_bos: bool | None
) -> Callable[[str, bool], list[int]]:
    """`Tokenizer.encode_text`; `add_bos_token` has precedence over the post-processor."""

    def encode(text: str, add_special: bool) -> list[int]:
        ids = backend.encode(text, add_special_tokens=add_special).ids
        if add_special and bos is not None and adds_bos is not None:
            has_bos = bool(ids) and ids[0] == bos
            plain = backend.encode(text, add_special_tokens=False).ids if has_bos else ids
            bos_in_text = bool(plain) and plain[0] == bos
            if adds_bos and not has_bos:
                return [bos, *ids]
            if not adds_bos and has_bos and not bos_in_text:
                return ids[1:]
        return ids

    return encode


def _decoders(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _decoders(step)
    else:
        yield decoder


def _to_bytes(
    kinds: list[dict[str, Any]], path: Path
) -> Callable[[Sequence[str], Collection[int]], list[bytes]]:
    types = {kind["type"] for kind in kinds}
    if "ByteLevel" in types:
        return bpe.byte_level_bytes
    replaced = any(kind["type"] == "Replace" and kind.get("content") == " " for kind in kinds)
    if replaced or types & {"ByteFallback", "Metaspace"}:
        return bpe.sentencepiece_bytes
    raise CheckpointError(
        f"{path}: unknown decoder ({', '.join(sorted(types)) or 'none'}); supported: byte-level, "
        "SentencePiece"
    )


def _adds_space_prefix(kinds: list[dict[str, Any]]) -> bool:
    return any(
        (kind["type"] == "Strip" and kind.get("start", 0) > 0)
        or (kind["type"] == "Metaspace" and kind.get("prepend_scheme", "always") != "never")
        for kind in kinds
    )


def _pieces(backend: tokenizers.Tokenizer) -> list[str]:
    """The vocabulary by id, including added tokens; unused ids have no text."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, index in vocabulary.items():
        pieces[index] = piece
    return pieces
