"""Turns a prompt and its parameters into a request that a unit can serve."""

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
    """Checks and tokenizes prompts, and numbers the requests. May be called from any thread."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._compilers: dict[str, tuple[Tokenizer, ConstraintCompiler]] = {}
        self._lock = threading.Lock()

    def process(
        self, models: Mapping[str, LoadedModel], name: str, prompt: Prompt, params: SamplingParams
    ) -> tuple[Request, Detokenizer]:
        """Returns a request that is ready to be queued, and its detokenizer.

        Args:
          models: the models of the fleet by name.
          name: of the requested model.
          prompt: text, or token ids.
          params: sampling parameters; the request gets a copy with a seed and the length limit.

        Raises:
          UnknownModel, InvalidRequest: the request cannot be served.
        """
        model = lookup_model(models, name)
        token_ids = _prompt_token_ids(model, prompt)
        if len(token_ids) >= model.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(token_ids)} tokens; {name} accepts at most "
                f"{model.max_model_len - 1}, which leaves one for the output",
                field="prompt",
            )
        if params.stop and model.tokenizer is None:
            raise InvalidRequest(
                f"{name} has no tokenizer, so stop strings cannot be found", field="stop"
            )
        eos_ids = () if params.ignore_eos else model.eos_token_ids
        stop_ids = tuple(dict.fromkeys((*eos_ids, *params.stop_token_ids)))
        if len(stop_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"{len(stop_ids)} stop tokens, including {len(eos_ids)} of {name}; at most "
                f"{MAX_STOP_TOKEN_IDS}",
                field="stop_token_ids",
            )
        if params.seed is None:
            # Drawn once: a preempted or moved request continues with the same seed.
            params = dataclasses.replace(params, seed=secrets.randbits(64))
        # Set here, so that the output has the same maximum length on every replica.
        max_tokens = min(params.max_tokens, model.max_model_len - len(token_ids))
        params = dataclasses.replace(params, max_tokens=max_tokens)
        _check_bias(model, params)
        constraint = None
        if params.grammar is not None:
            constraint = self._compiler(model).compile(params.grammar, eos_ids)
        request = Request(
            id=next(self._ids),
            model=name,
            prompt=token_ids,
            params=params,
            stop_ids=stop_ids,
            arrival=time.perf_counter(),
            constraint=constraint,
        )
        return request, Detokenizer(model.tokenizer, params.stop, params.min_tokens)

    def forget(self, name: str) -> None:
        """Drops the compiled vocabulary of a model that was unloaded."""
        with self._lock:
            self._compilers.pop(name, None)

    def _compiler(self, model: LoadedModel) -> ConstraintCompiler:
        if model.tokenizer is None:
            raise InvalidRequest(
                f"{model.name} has no tokenizer, so its output cannot follow a grammar",
                field="grammar",
            )
        with self._lock:
            cached = self._compilers.get(model.name)
            if cached is None or cached[0] is not model.tokenizer:  # a new model of the same name
                compiler = ConstraintCompiler(model.tokenizer, model.config.vocab_size)
                cached = (model.tokenizer, compiler)
                self._compilers[model.name] = cached
            return cached[1]


def lookup_model(models: Mapping[str, LoadedModel], name: str) -> LoadedModel:
    """Returns the model with this name.

    Raises:
      UnknownModel: there is none.
    """
    model = models.get(name)
    if model is None:
        raise UnknownModel(f"no model {name!r}; there are {', '.join(models)}", field="model")
    return model


def _check_bias(model: LoadedModel, params: SamplingParams) -> None:
    vocab_size = model.config.vocab_size
    unknown = [token for token in params.logit_bias if token >= vocab_size]
    if unknown:
        raise InvalidRequest(
            f"{unknown[0]} is not a token id of {model.name}: valid ids are 0 to {vocab_size - 1}",
            field="logit_bias",
        )


def _prompt_token_ids(model: LoadedModel, prompt: Prompt) -> list[int]:
    """Returns the prompt's token ids, validated."""
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("the prompt is empty", field="prompt")
        if model.tokenizer is None:
            raise InvalidRequest(
                f"{model.name} has no tokenizer: give the prompt as token ids", field="prompt"
            )
        token_ids = model.tokenizer.encode(prompt)
    else:
        token_ids = list(prompt)
    if not token_ids:
        raise InvalidRequest("the prompt is empty", field="prompt")
    vocab_size = model.config.vocab_size
    for token in token_ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{token!r} is not a token id of {model.name}: valid ids are 0 to {vocab_size - 1}",
                field="prompt",
            )
    return token_ids
