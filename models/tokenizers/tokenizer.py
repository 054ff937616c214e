"""Conversion of text to token ids and back.

Encoding uses Hugging Face's `tokenizers`, configured by `hf_tokenizer`, `gguf_tokenizer` or
`llama2c`. Decoding concatenates the bytes of the tokens, as UTF-8. Decoding a stream token by token
therefore gives exactly the text of decoding all tokens at once, without partial characters.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from muxjax.errors import CheckpointError, InvalidRequest
from muxjax.models.tokenizers.chat_template import render_chat


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer.

    Attributes:
      encode_text: returns the ids of a text; the second argument: whether to add special tokens.
      pieces: the bytes of every id; for special tokens, the bytes of their names.
      special_ids: ids of control tokens, which decoding omits.
      bos_token_id: id of the begin token, or None.
      eos_token_ids: ids of the tokens that end an output.
      chat_template: Jinja source, or None.
      special_tokens: texts of special tokens for chat templates, by name (`bos_token`, ...).
      adds_space_prefix: whether encoding prepends a space to the text (Llama 2), which decoding
        removes after the begin token.
      to_files: returns the contents of the tokenizer's Hugging Face files by name.
    """

    encode_text: Callable[[str, bool], list[int]]
    pieces: Sequence[bytes]
    special_ids: frozenset[int] = frozenset()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    adds_space_prefix: bool = False
    to_files: Callable[[], dict[str, str]] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of the tokenizer's ids; a model's padded vocabulary may be larger."""
        return len(self.pieces)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Encodes a text to token ids. Names of special tokens in the text become those tokens.

        Args:
          text: any text.
          add_special: whether to add the begin token, if the model was trained with one. Use False
            for the output of a chat template, which contains it.

        Raises:
          InvalidRequest: the text is not valid Unicode, or the vocabulary cannot express it.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text is not valid Unicode at character {error.start}", field="prompt"
            ) from error
        return self.encode_text(text, add_special)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes tokens to text, without special tokens.

        Bytes that are not UTF-8 become U+FFFD. If the tokenizer prepends a space and `ids` start
        with the begin token, that space is removed; in other sequences (continuations), a leading
        space is part of the text.
        """
        stream = self.decode_stream()
        return stream.push(ids) + stream.flush()

    def decode_stream(self) -> DecodeStream:
        """Creates an incremental decoder for the tokens of one sequence."""
        return DecodeStream(self)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token: a special token's name; empty for an unknown id."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def token_text(self, token: int) -> str:
        """The text of one token for display, with U+FFFD for bytes that are not UTF-8."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def files(self) -> dict[str, str]:
        """The contents of Hugging Face's tokenizer.json and tokenizer_config.json, by name.

        Raises:
          CheckpointError: the tokenizer has no such files.
        """
        if self.to_files is None:
            raise CheckpointError("this tokenizer cannot be written as tokenizer.json")
        return self.to_files()

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Renders the prompt text of a conversation; encode it with `add_special=False`.

        Args:
          messages: as in `render_chat`.
          add_generation_prompt: as in `render_chat`.
          tools: as in `render_chat`.

        Raises:
          InvalidRequest: the model has no chat template, or the template rejects the messages.
        """
        if self.chat_template is None:
            raise InvalidRequest(
                "this model has no chat template: use completions with a plain prompt",
                field="messages",
            )
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            tools=tools,
        )


class DecodeStream:
    """Decodes tokens to text as they arrive; see `Tokenizer.decode_stream`.

    The texts of all `push` calls and `flush`, concatenated, equal `Tokenizer.decode` of all tokens.
    An incomplete character at the end is held back until it is complete or known to be invalid.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._started = False
        self._drop_space = False

    def push(self, ids: Iterable[int]) -> str:
        """Decodes further tokens; returns the text that is now complete, which may be empty."""
        parts = []
        for token in ids:
            if not self._started:
                self._started = True
                bos = self._tokenizer.bos_token_id
                self._drop_space = (
                    self._tokenizer.adds_space_prefix and token == bos and bos is not None
                )
            if token in self._tokenizer.special_ids:
                continue
            piece = self._tokenizer.token_bytes(token)
            if self._drop_space and piece:
                piece = piece.removeprefix(b" ")
                self._drop_space = False
            parts.append(piece)
        return self._decoder.decode(b"".join(parts))

    def flush(self) -> str:
        """Returns the remaining text: U+FFFD for an incomplete character, or empty."""
        return self._decoder.decode(b"", final=True)
