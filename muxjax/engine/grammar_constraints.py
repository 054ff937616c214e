"""Grammar constraints with llguidance, on the host: masks of the tokens allowed next.

The `ConstraintCompiler` of a model stores its vocabulary as a trie, built for the first grammar.
Each request has a `GrammarConstraint`, which advances with the request's tokens and computes the
mask of the next token.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import llguidance
import numpy as np

from muxjax.errors import InvalidRequest
from muxjax.executor.step_inputs import mask_words
from muxjax.grammar import Grammar
from muxjax.models.tokenizers.tokenizer import Tokenizer

_WHITESPACE = r"[ \n\r\t]{1,20}"
"""White space between the parts of JSON; bounded, since models may generate it without end."""


class ConstraintCompiler:
    """Compiles grammars for the vocabulary of one model. May be called from any thread.

    Args:
      tokenizer: of the model.
      vocab_size: of the model; may be padded beyond the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._vocabulary_lock = threading.Lock()

    def compile(self, grammar: Grammar, end_ids: Sequence[int]) -> GrammarConstraint:
        """Returns the constraint of a new output.

        Args:
          grammar: the grammar of the output.
          end_ids: end tokens, allowed only where the grammar allows the output to end.

        Raises:
          InvalidRequest: the grammar is invalid, unsupported, too complex, or cannot be expressed
            in the model's vocabulary.
        """
        with self._vocabulary_lock:
            vocabulary = self._vocabulary
        matcher = llguidance.LLMatcher(
            vocabulary,
            _source(grammar),
            log_level=0,
            limits=llguidance.LLParserLimits(verbose_errors=False),
        )
        is_end = np.zeros(mask_words(self._vocab_size) * 32, bool)
        is_end[[token for token in end_ids if token < self._vocab_size]] = True
        end_mask = _pack_bits(is_end)
        return GrammarConstraint(matcher, self._text_mask & ~end_mask, end_mask)

    @functools.cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size)),
            n_vocab=self._vocab_size + 1,
            slices=llguidance.LLTokenizer.json_slices(),
        )

    @functools.cached_property
    def _text_mask(self) -> np.ndarray:
        """The tokens that have text, uint32 `[W]`, one bit a token."""
        has_text = np.zeros(mask_words(self._vocab_size) * 32, bool)
        for token, piece in enumerate(self._tokenizer.pieces[: self._vocab_size]):
            has_text[token] = bool(piece) and token not in self._tokenizer.special_ids
        return _pack_bits(has_text)


class GrammarConstraint:
    """The state of one output; see `muxjax.scheduling.constraint.Constraint`.

    Args:
      matcher: llguidance's state of the grammar, at its start.
      text_mask: tokens that may be part of the output, uint32 `[W]`, one bit a token.
      end_mask: tokens that end the output, allowed where the grammar may end, likewise.

    Raises:
      InvalidRequest: the grammar is not valid, or no token of the vocabulary can follow it.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher, text_mask: np.ndarray, end_mask: np.ndarray
    ) -> None:
        self._matcher = matcher
        self._text_mask = text_mask
        self._end_mask = end_mask
        self._mask = self._next_mask()

    @property
    def mask(self) -> np.ndarray:
        """See `Constraint.mask`."""
        return self._mask

    def advance(self, token: int) -> bool:
        """See `Constraint.advance`."""
        if not self._matcher.consume_token(token):
            self._check()
            raise InvalidRequest(f"token {token} does not follow the grammar", field="grammar")
        if self._matcher.is_stopped():
            self._check()
            return True
        self._mask = self._next_mask()
        return False

    def replay(self, tokens: Sequence[int]) -> GrammarConstraint:
        """See `Constraint.replay`."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        constraint = GrammarConstraint(matcher, self._text_mask, self._end_mask)
        for token in tokens:
            constraint.advance(token)
        return constraint

    def _next_mask(self) -> np.ndarray:
        self._check()
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        mask = allowed[: len(self._text_mask)] & self._text_mask
        self._check()
        if self._matcher.is_accepting():
            mask |= self._end_mask
        if not mask.any():
            raise InvalidRequest(
                "the model's vocabulary has no token with which the output can follow the grammar",
                field="grammar",
            )
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().replace("<non-verbose/>", "").strip()
            raise InvalidRequest(
                f"the grammar cannot be used: {reason.partition(chr(10))[0]}", field="grammar"
            )


class _Vocabulary:
    """A tokenizer with the interface that llguidance expects.

    llguidance needs exactly one end token, and a model may have several or none. The end token
    here is therefore one past the vocabulary; `GrammarConstraint` adds the model's end tokens.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        pieces = [bytes(piece) for piece in tokenizer.pieces[:vocab_size]]
        self.tokens = [*pieces, *[b""] * (vocab_size - len(pieces)), b"<|end|>"]
        special = [id_ for id_ in tokenizer.special_ids if id_ < vocab_size]
        self.special_token_ids = [*sorted(special), vocab_size]
        self.eos_token_id = vocab_size
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Returns the token ids of a forced text; empty if they decode to another text."""
        try:
            ids = self._tokenizer.encode(text, add_special=False)
        except InvalidRequest:
            return []
        # Llama 2's tokenizer adds a space before every text.
        is_same_text = b"".join(self.tokens[id_] for id_ in ids) == text.encode("utf-8")
        return ids if is_same_text else []


def _source(grammar: Grammar) -> str:
    """Returns the grammar in llguidance's format.

    Raises:
      InvalidRequest: a JSON schema is not valid.
    """
    matcher = llguidance.LLMatcher
    if grammar.kind == "regex":
        return matcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return matcher.grammar_from_lark(grammar.text)
    try:
        # Overrides: a schema must not disable checks with its `x-guidance` key.
        return matcher.grammar_from_json_schema(
            grammar.text,
            overrides={"lenient": False, "coerce_one_of": False, "whitespace_pattern": _WHITESPACE},
        )
    except ValueError as error:
        raise InvalidRequest(f"the schema is not valid: {error}", field="grammar") from error


def _pack_bits(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, bitorder="little").view(np.uint32)
