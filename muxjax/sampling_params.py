"""Sampling parameters: how the tokens of a request are selected, and when its output ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from muxjax.errors import InvalidRequest
from muxjax.grammar import Grammar

MAX_LOGPROBS = 20
"""Maximum of `SamplingParams.logprobs` (OpenAI's limit for chat)."""
MAX_STOP_TOKEN_IDS = 8
"""Maximum number of stop token ids of a request, including the model's end tokens."""
MAX_LOGIT_BIAS = 300
"""Maximum number of tokens in `SamplingParams.logit_bias`."""
MAX_STOP_STRINGS = 16
"""Maximum number of strings in `SamplingParams.stop`."""
MAX_PRIORITY = 100
"""`SamplingParams.priority` is from -MAX_PRIORITY to MAX_PRIORITY."""
MAX_SALT = 256
"""Maximum length of `SamplingParams.cache_salt`, in characters."""
HEAD_START = 1000
"""Queue positions by which a request advances for each step of priority."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request. None of them causes a compilation.

    Attributes:
      max_tokens: maximum number of tokens to generate; the model's length limit may be lower.
      temperature: logits are divided by it; 0 selects the most likely token (greedy).
      top_k: keep the k most likely tokens; 0 and -1 keep all (-1 is stored as 0).
      top_p: keep the most likely tokens whose probabilities add up to this (nucleus sampling).
      min_p: minimum probability of a token, as a fraction of the most likely token's.
      repetition_penalty: divides positive logits, and multiplies negative ones, of every token
        seen in prompt or output (CTRL, Keskar et al. 2019).
      presence_penalty: subtracted from the logits of tokens already in the output.
      frequency_penalty: subtracted once for each time a token is already in the output.
      seed: the same seed gives the same tokens, whatever the request is batched with. None draws
        a random seed.
      stop: a string, or strings, that end the output; not included in the text.
      stop_token_ids: tokens that end the output, in addition to the model's end tokens.
      ignore_eos: continue after the model's end tokens.
      min_tokens: minimum number of tokens before a stop token or stop string ends the output.
      logit_bias: added to the logits of these tokens, by id, before penalties; from -100 to 100.
      logprobs: number of alternatives to report for each token, from the raw logits, before
        temperature and penalties. 0: only the selected token's log-probability. None: nothing.
      prompt_logprobs: the same for the tokens of the prompt from the second on.
      grammar: the form that the output must have; see `muxjax.grammar`.
      priority: a request of higher priority is queued ahead, by `HEAD_START` queue positions for
        each step, so that no request waits forever. None is 0, or the priority of the API key.
      cache_salt: partition of the prefix cache, 1 to 256 characters. A request uses only prefixes
        of requests with the same salt; those without a salt form one partition.

    Raises:
      InvalidRequest: a value is out of its range; `field` names it.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    priority: int | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise InvalidRequest(f"{name} must be a list, not {value!r}", field=name)
            object.__setattr__(self, name, tuple(value))
        self._check_int("max_tokens", 1, 2**31 - 1)
        self._check_int("min_tokens", 0, 2**31 - 1)
        self._check_int("top_k", -1, 2**31 - 1)
        object.__setattr__(self, "top_k", max(0, self.top_k))
        if self.priority is not None:
            self._check_int("priority", -MAX_PRIORITY, MAX_PRIORITY)
        self._check_float("temperature", 0.0, 100.0)
        self._check_float("top_p", 0.0, 1.0, exclusive=True)
        self._check_float("min_p", 0.0, 1.0)
        self._check_float("repetition_penalty", 0.0, 100.0, exclusive=True)
        self._check_float("presence_penalty", -2.0, 2.0)
        self._check_float("frequency_penalty", -2.0, 2.0)
        if self.seed is not None:
            self._check_int("seed", -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_int(name, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest(
                f"ignore_eos must be true or false, not {self.ignore_eos!r}", field="ignore_eos"
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS}", field="stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequest(
                    f"stop must contain non-empty strings, not {text!r}", field="stop"
                )
        for token in self.stop_token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
                raise InvalidRequest(
                    f"stop_token_ids must contain token ids, not {token!r}",
                    field="stop_token_ids",
                )
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens must not be above max_tokens ({self.max_tokens}), not "
                f"{self.min_tokens}",
                field="min_tokens",
            )
        self._check_bias()
        self._check_salt()
        if self.grammar is not None:
            self._check_grammar(self.grammar)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always selected."""
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether any penalty changes the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def _check_int(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidRequest(
                f"{name} must be a whole number from {low} to {high}, not {value!r}", field=name
            )

    def _check_float(self, name: str, low: float, high: float, *, exclusive: bool = False) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not low <= value <= high:
            raise InvalidRequest(
                f"{name} must be a number from {low} to {high}, not {value!r}", field=name
            )
        if exclusive and value == low:
            raise InvalidRequest(f"{name} must be above {low}", field=name)

    def _check_bias(self) -> None:
        bias = self.logit_bias
        if not isinstance(bias, Mapping):
            raise InvalidRequest(
                f"logit_bias must map token ids to numbers, not {bias!r}", field="logit_bias"
            )
        if len(bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias names {len(bias)} tokens; at most {MAX_LOGIT_BIAS}",
                field="logit_bias",
            )
        for token, value in bias.items():
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
                raise InvalidRequest(
                    f"logit_bias must name token ids, not {token!r}", field="logit_bias"
                )
            if not _is_number(value) or not -100.0 <= value <= 100.0:
                raise InvalidRequest(
                    f"logit_bias must contain numbers from -100 to 100, not {value!r}",
                    field="logit_bias",
                )
        object.__setattr__(self, "logit_bias", dict(bias))

    def _check_salt(self) -> None:
        salt = self.cache_salt
        if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT):
            raise InvalidRequest(
                f"cache_salt must be a string of 1 to {MAX_SALT} characters", field="cache_salt"
            )

    def _check_grammar(self, grammar: Grammar) -> None:
        if not isinstance(grammar, Grammar):
            raise InvalidRequest(
                f"grammar must be a muxjax.grammar.Grammar, not {grammar!r}", field="grammar"
            )
        if self.min_tokens:
            raise InvalidRequest(
                "min_tokens cannot be combined with a grammar, which determines the output's end",
                field="min_tokens",
            )


def _is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
    )
