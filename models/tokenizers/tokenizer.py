"""Text to token ids and back.

Encoding is done by Hugging Face's `tokenizers`, set up by `hf_tokenizer`, `gguf_tokenizer` or
`llama2c`. Decoding is done here, from the bytes of each token: the text of a sequence is the UTF-8
of its tokens' bytes in a row, so a stream can be decoded token by token and gives exactly the text
that decoding all at once gives, never half a character.
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
      encode_text: text, and whether to add what the model expects around it -> ids.
      pieces: the bytes of every id; of special tokens, the bytes of their names.
      special_ids: control tokens, which decoding leaves out.
      bos_token_id: the begin token, if the model has one.
      eos_token_ids: tokens that end an output.
      chat_template: Jinja source, or None.
      special_tokens: texts that chat templates may ask for, by name (`bos_token`, ...).
      adds_space_prefix: encoding puts a space before the text (Llama 2), which decoding takes off again
        after the begin token.
      to_files: makes the Hugging Face files of this tokenizer, name to contents.
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
        """Number of ids that the tokenizer knows; a model's own vocabulary may be padded."""
        return len(self.pieces)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text. Names of special tokens in it become these tokens.

        Args:
          text: any text.
          add_special: add the begin token where the model was trained with one. False for the text
            that a chat template made, which has its own.

        Raises:
          InvalidRequest: text that is not valid Unicode, or that the vocabulary cannot express.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text is not valid Unicode at character {error.start}", field="prompt"
            ) from error
        return self.encode_text(text, add_special)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens, without special ones.

        Bytes that are not UTF-8 become U+FFFD. Where the model puts a space before every text and
        `ids` begin with the begin token, that space is taken off; elsewhere (a continuation) a
        leading space is part of the text.
        """
        stream = self.decode_stream()
        return stream.push(ids) + stream.flush()

    def decode_stream(self) -> DecodeStream:
        """Decodes a sequence as it grows."""
        return DecodeStream(self)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; of a special token, its name; nothing for an unknown id."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def token_text(self, token: int) -> str:
        """One token for people: as `token_bytes`, with U+FFFD for what is not UTF-8 on its own."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def files(self) -> dict[str, str]:
        """This tokenizer as Hugging Face's tokenizer.json and tokenizer_config.json.

        Raises:
          CheckpointError: it cannot be written as such files.
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
        """The prompt text of a conversation; encode it with `add_special=False`.

        Raises:
          InvalidRequest: the model has no chat template, or the template refuses the messages.
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
    """Turns tokens into text as they come; see `Tokenizer.decode_stream`.

    The texts of all `push` calls and of `flush`, joined, are `Tokenizer.decode` of all tokens. An
    incomplete character at the end is held back until it is complete or cannot be any more.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._started = False
        self._drop_space = False

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty."""
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
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
