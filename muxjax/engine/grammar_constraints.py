"""Grammars on the host, by llguidance: which tokens may come next.

One `ConstraintCompiler` a model holds its vocabulary as a trie, made when the first grammar is
asked for. Each request then has a `GrammarConstraint`, which reads the request's tokens and
computes the mask of the next one, in about 50 µs for common grammars.
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

_SPACES = r"[ \n\r\t]{1,20}"
"""Between the parts of JSON. Bounded, as models that have lost their way make spaces for ever."""


class ConstraintCompiler:
    """Makes the constraints of one model's requests. Safe to use from any thread.

    Args:
      tokenizer: the model's.
      vocab_size: the model's, which may be padded beyond the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._making = threading.Lock()

    def start(self, grammar: Grammar, ends: Sequence[int]) -> GrammarConstraint:
        """The constraint of a new output.

        Args:
          grammar: what the output must be.
          ends: tokens that end it: allowed where the grammar allows an end, and nowhere else.

        Raises:
          InvalidRequest: the grammar is not valid, not supported, too complex, or cannot be written
            in the model's vocabulary.
        """
        with self._making:
            vocabulary = self._vocabulary
        matcher = llguidance.LLMatcher(
            vocabulary,
            _source(grammar),
            log_level=0,
            limits=llguidance.LLParserLimits(verbose_errors=False),
        )
        ending = np.zeros(mask_words(self._vocab_size) * 32, bool)
        ending[[token for token in ends if token < self._vocab_size]] = True
        packed = _packed(ending)
        return GrammarConstraint(matcher, self._usable & ~packed, packed)

    @functools.cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size)),
            n_vocab=self._vocab_size + 1,
            slices=llguidance.LLTokenizer.json_slices(),
        )

    @functools.cached_property
    def _usable(self) -> np.ndarray:
        """A mask of the tokens that have text."""
        usable = np.zeros(mask_words(self._vocab_size) * 32, bool)
        for token, piece in enumerate(self._tokenizer.pieces[: self._vocab_size]):
            usable[token] = bool(piece) and token not in self._tokenizer.special_ids
        return _packed(usable)


class GrammarConstraint:
    """The state of one output; see `muxjax.scheduling.constraint.Constraint`.

    Args:
      matcher: llguidance's state of the grammar, at its start.
      usable: a mask of the tokens that may be part of the output.
      ends: a mask of the tokens that may end the output where the grammar allows it.

    Raises:
      InvalidRequest: the grammar cannot be followed.
    """

    def __init__(self, matcher: llguidance.LLMatcher, usable: np.ndarray, ends: np.ndarray) -> None:
        self._matcher = matcher
        self._usable = usable
        self._ends = ends
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
        made = GrammarConstraint(matcher, self._usable, self._ends)
        for token in tokens:
            made.advance(token)
        return made

    def _next_mask(self) -> np.ndarray:
        self._check()
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        mask = found[: len(self._usable)] & self._usable
        self._check()
        if self._matcher.is_accepting():
            mask |= self._ends
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
    """A tokenizer in the form that llguidance asks for.

    Its end token is one beyond the vocabulary, as the model's own are added to the masks: there may
    be several of them, or none.
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
        """Tokens of a text that the grammar forces: as the model writes it, if it can write it."""
        try:
            ids = self._tokenizer.encode(text, add_special=False)
        except InvalidRequest:
            return []
        # Llama 2's tokenizer writes a space before every text.
        same = b"".join(self.tokens[id_] for id_ in ids) == text.encode("utf-8")
        return ids if same else []


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form.

    Raises:
      InvalidRequest: it is not in the form that its kind says.
    """
    matcher = llguidance.LLMatcher
    if grammar.kind == "regex":
        return matcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return matcher.grammar_from_lark(grammar.text)
    try:
        # Overrides, so that a schema cannot turn checks off by `x-guidance`.
        return matcher.grammar_from_json_schema(
            grammar.text,
            overrides={"lenient": False, "coerce_one_of": False, "whitespace_pattern": _SPACES},
        )
    except ValueError as error:
        raise InvalidRequest(f"the schema is not valid: {error}", field="grammar") from error


def _packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, bitorder="little").view(np.uint32)
