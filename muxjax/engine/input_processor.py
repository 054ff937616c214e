"""From what is asked of a model to a request that its unit can serve."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import threading
import time
from collections.abc import Mapping, Sequence

from muxjax.engine.detokenizer import Detokenizer
from muxjax.engine.grammar_constraints import ConstraintCompiler
from muxjax.engine.loaded_model import LoadedModel
from muxjax.errors import InvalidRequest, UnknownModel
from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams
from muxjax.scheduling.requests import Request

type Prompt = str | Sequence[int]


class InputProcessor:
    """Checks what is asked for, and numbers it. From any thread."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._vocabularies: dict[str, tuple[Tokenizer, ConstraintCompiler]] = {}
        self._lock = threading.Lock()

    def make(
        self, models: Mapping[str, LoadedModel], name: str, prompt: Prompt, params: SamplingParams
    ) -> tuple[Request, Detokenizer]:
        """A request and what makes its text.

        Args:
          models: that there are.
          name: of one of them.
          prompt: a text or token ids.
          params: settings.

        Raises:
          UnknownModel, InvalidRequest: the request cannot be served.
        """
        model = models.get(name)
        if model is None:
            raise UnknownModel(f"no model {name!r}; there are {', '.join(models)}", field="model")
        tokens = _tokens(model, prompt)
        if len(tokens) >= model.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(tokens)} tokens; {name} takes at most "
                f"{model.max_model_len - 1}, which leaves one for the output",
                field="prompt",
            )
        if params.stop and model.tokenizer is None:
            raise InvalidRequest(
                f"{name} has no tokenizer, so stop strings cannot be found", field="stop"
            )
        own = () if params.ignore_eos else model.eos_token_ids
        stop_ids = tuple(dict.fromkeys((*own, *params.stop_token_ids)))
        if len(stop_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"{len(stop_ids)} stop tokens, {name}'s own {len(own)} included; at most "
                f"{MAX_STOP_TOKEN_IDS}",
                field="stop_token_ids",
            )
        if params.seed is None:
            # Drawn once a request: one that is preempted goes on with the same.
            params = dataclasses.replace(params, seed=secrets.randbits(64))
        # Replicas may have room for unlike lengths; wherever it goes on, it ends at the same.
        longest = min(params.max_tokens, model.max_model_len - len(tokens))
        params = dataclasses.replace(params, max_tokens=longest)
        _check_bias(model, params)
        constraint = None
        if params.grammar is not None:
            constraint = self._constraints(model).start(params.grammar, own)
        request = Request(
            id=next(self._ids),
            model=name,
            prompt=tokens,
            params=params,
            stop_ids=stop_ids,
            arrival=time.perf_counter(),
            constraint=constraint,
        )
        return request, Detokenizer(model.tokenizer, params.stop, params.min_tokens)

    def _constraints(self, model: LoadedModel) -> ConstraintCompiler:
        if model.tokenizer is None:
            raise InvalidRequest(
                f"{model.name} has no tokenizer, so its output cannot follow a grammar",
                field="grammar",
            )
        with self._lock:
            known = self._vocabularies.get(model.name)
            if known is None or known[0] is not model.tokenizer:  # another model of this name
                known = (
                    model.tokenizer,
                    ConstraintCompiler(model.tokenizer, model.config.vocab_size),
                )
                self._vocabularies[model.name] = known
            return known[1]

    def forget(self, name: str) -> None:
        """Drops what is kept for a model that there is no more."""
        with self._lock:
            self._vocabularies.pop(name, None)


def _check_bias(model: LoadedModel, params: SamplingParams) -> None:
    vocab = model.config.vocab_size
    unknown = [token for token in params.logit_bias if token >= vocab]
    if unknown:
        raise InvalidRequest(
            f"{unknown[0]} is not a token id of {model.name}: they are 0 to {vocab - 1}",
            field="logit_bias",
        )


def _tokens(model: LoadedModel, prompt: Prompt) -> list[int]:
    """The prompt's token ids, checked."""
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("the prompt is empty", field="prompt")
        if model.tokenizer is None:
            raise InvalidRequest(
                f"{model.name} has no tokenizer: give the prompt as token ids", field="prompt"
            )
        tokens = model.tokenizer.encode(prompt)
    else:
        tokens = list(prompt)
    if not tokens:
        raise InvalidRequest("the prompt is empty", field="prompt")
    vocab = model.config.vocab_size
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
            raise InvalidRequest(
                f"{token!r} is not a token id of {model.name}: they are 0 to {vocab - 1}",
                field="prompt",
            )
    return tokens
