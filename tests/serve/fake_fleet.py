"""A fake of `muxjax.fleet.Fleet` with known outputs.

Tokens are bytes; 256 begins a prompt and 257 ends an output. The output is `text` if set, otherwise
the bytes of the prompt, repeated up to `max_tokens` (`ab` -> `ababab...`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from muxjax.config.fleet_file import FleetConfig
from muxjax.engine.health import ModelHealth, ModelStatus, UnitHealth
from muxjax.errors import EngineDead, FleetConfigError, InvalidRequest, Overloaded, UnknownModel
from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.outputs import Delta
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.requests import FinishReason
from muxjax.scheduling.steps import TokenLogprobs

BOS, EOS = 256, 257
_NUMBERS = itertools.count()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def fake_tokenizer(chat_template: str | None) -> Tokenizer:
    """Returns a byte tokenizer whose encoding adds a begin token."""

    def encode(text: str, add_special: bool) -> list[int]:
        return [BOS] * add_special + list(text.encode())

    pieces = [bytes([byte]) for byte in range(256)] + [b"<bos>", b"<eos>"]
    return Tokenizer(
        encode_text=encode,
        pieces=pieces,
        special_ids=frozenset({BOS, EOS}),
        bos_token_id=BOS,
        eos_token_ids=(EOS,),
        chat_template=chat_template,
    )


@dataclass(frozen=True)
class FakeModel:
    name: str
    tokenizer: Tokenizer | None
    max_model_len: int = 256


@dataclass
class FakeFleet:
    """Generates one token per `delay` seconds; `active` has the requests that have not ended."""

    delay: float = 0.0
    text: str | None = None
    dead: str | None = None
    refusal: Overloaded | None = None
    die_after: int | None = None
    models: Mapping[str, FakeModel] = field(
        default_factory=lambda: {
            "chat": FakeModel("chat", fake_tokenizer(TEMPLATE)),
            "plain/base": FakeModel("plain/base", fake_tokenizer(None)),
            "ids": FakeModel("ids", None),
        }
    )
    requests: list[tuple[str, list[int], SamplingParams]] = field(default_factory=list)
    active: set[int] = field(default_factory=set)
    closed: bool = False
    stalled: float = 0.0
    restarts: int = 0
    restartable: bool = False
    states: dict[str, ModelHealth] = field(default_factory=dict)
    changed: list[tuple[str, ...]] = field(default_factory=list)
    fault: Exception | None = None

    def model_states(self) -> dict[str, ModelHealth]:
        awake = ModelHealth("loaded", None, False)
        return {name: self.states.get(name, awake) for name in self.models}

    def _change(self, action: str, model: str, status: ModelStatus) -> None:
        if self.fault is not None:
            raise self.fault
        self.changed.append((action, model))
        if model not in self.models:
            raise UnknownModel(f"no model {model!r}", field="model")
        self.states[model] = ModelHealth(status, None, False)

    @property
    def admin(self) -> FakeFleet:
        return self

    def load(self, entry: Mapping[str, Any] | str, unit: str | None = None) -> None:
        if not isinstance(entry, str):
            raise FleetConfigError("models[0].source: this fleet loads none")
        self._change("load", entry, "loaded")

    def unload(self, model: str) -> None:
        self._change("unload", model, "loaded")
        if model == "ids":
            self.models = {name: entry for name, entry in self.models.items() if name != model}

    def sleep(self, model: str) -> None:
        self._change("sleep", model, "sleeping")

    def wake(self, model: str) -> None:
        self._change("wake", model, "loaded")

    def reload(self, source: FleetConfig) -> dict[str, Any]:
        if self.fault is not None:
            raise self.fault
        self.changed.append(("reload", *(model.name for model in source.models)))
        return {"added": [], "removed": [], "replaced": [], "changed": ["chat"], "failed": {}}

    def stream(
        self, model: str, prompt: str | list[int], params: SamplingParams | None = None
    ) -> FakeStream:
        if self.dead:
            raise EngineDead(self.dead)
        if self.refusal is not None:
            raise self.refusal
        if model not in self.models:
            raise UnknownModel(f"no model {model!r}", field="model")
        assert isinstance(prompt, list)
        params = params or SamplingParams()
        limit = self.models[model].max_model_len
        if len(prompt) >= limit:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens; {model} takes {limit - 1}", field="prompt"
            )
        if any(not 0 <= token <= EOS for token in prompt):
            raise InvalidRequest("the prompt has a token id out of range", field="prompt")
        self.requests.append((model, prompt, params))
        number = next(_NUMBERS)
        self.active.add(number)
        return FakeStream(self, model, number, prompt, params)

    def __enter__(self) -> FakeFleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def stats(self, *, block: bool = True) -> dict[str, Any]:
        if self.dead and block:
            raise EngineDead(self.dead)
        running = dict.fromkeys(self.models, 0)
        models = {
            name: {"waiting": 0, "running": count, "kv_pages_used": 4 * count, "output_tokens": 0}
            for name, count in running.items()
        }
        return {"running": len(self.active), "usable_pages": 100, "models": models}

    def health(self) -> list[UnitHealth]:
        return [
            UnitHealth(
                "0", tuple(self.models), self.dead is None, self.stalled, self.dead, self.restarts
            )
        ]

    def restart(self, unit: str, reason: str) -> None:
        if not self.restartable:
            raise EngineDead("cannot be restarted")
        self.dead, self.stalled = None, 0.0
        self.restarts += 1


class FakeStream:
    def __init__(
        self,
        fleet: FakeFleet,
        model: str,
        number: int,
        prompt: list[int],
        params: SamplingParams,
    ) -> None:
        self._fleet = fleet
        self._number = number
        self._prompt = prompt
        self._params = params
        self._model = fleet.models[model]
        self._cancelled = threading.Event()
        self._ended = asyncio.Event()
        self._error: BaseException | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prompt)

    @property
    def num_cached_tokens(self) -> int:
        return len(self._prompt) // 16 * 16

    def cancel(self) -> None:
        self._cancelled.set()
        self._fleet.active.discard(self._number)

    def end(self, error: BaseException | None = None) -> None:
        self.cancel()
        self._error = error
        self._ended.set()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas()

    def _output(self) -> tuple[list[int], FinishReason]:
        if self._fleet.text is not None:
            return [*self._fleet.text.encode(), EOS], "stop"
        content = [token for token in self._prompt if token < BOS] or [ord("?")]
        length = min(self._params.max_tokens, self._model.max_model_len - len(self._prompt))
        return [content[index % len(content)] for index in range(length)], "length"

    async def _deltas(self) -> AsyncIterator[Delta]:
        tokens, reason = self._output()
        decoder = None if self._model.tokenizer is None else self._model.tokenizer.decode_stream()
        for count, token in enumerate(tokens, start=1):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), self._fleet.delay)
            if self._ended.is_set():
                if self._error is not None:
                    raise self._error
                yield Delta("", [], None, "abort")
                return
            if self._fleet.die_after is not None and count > self._fleet.die_after:
                raise EngineDead("the engine's loop has ended: out of memory")
            last = count == len(tokens)
            text = "" if decoder is None else decoder.push([token])
            if last:
                self._fleet.active.discard(self._number)
            prompt = None
            if count == 1 and self._params.prompt_logprobs is not None:
                prompt = [
                    self._token_logprobs(token, self._params.prompt_logprobs)
                    for token in self._prompt[1:]
                ]
            end = reason if last else None
            yield Delta(text, [token], self._logprobs(token), end, prompt)

    def _logprobs(self, token: int) -> list[TokenLogprobs] | None:
        alternatives = self._params.logprobs
        return None if alternatives is None else [self._token_logprobs(token, alternatives)]

    def _token_logprobs(self, token: int, alternatives: int) -> TokenLogprobs:
        top: Sequence[tuple[int, float]] = [(token, -0.5), (token ^ 1, -1.5), (0, float("-inf"))]
        return TokenLogprobs(-0.5, list(top[:alternatives]))
