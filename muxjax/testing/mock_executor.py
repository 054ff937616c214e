"""A mock executor whose tokens follow from simple arithmetic.

The next token of a sequence is

    (31 * sum of all its tokens + 7 * their number + salt + extra) % vocab

where `salt` is the sum of the bytes of the model's name. `extra` is the seed of a request that is
not greedy, plus the number of its output tokens if it has a penalty. With a mask, the token is the
first from there on that the mask allows, modulo `vocab`. `mock_tokens` computes the tokens of a
request without other load.

Tokens are written to a simulated pool through the block tables of the step, in all layers, and read
back through the block tables for each sampled token. A wrong, overlapping or poisoned page
therefore raises `MockPoolError` or changes the tokens. Slots have the same state as on the device
(`scheduling.steps`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.constraint import Constraint
from muxjax.scheduling.specs import ModelSpec
from muxjax.scheduling.steps import (
    Decode,
    DecodeSequence,
    Prefill,
    PrefillChunk,
    Step,
    StepResult,
    TokenLogprobs,
)

VOCAB = 1009


class MockPoolError(AssertionError):
    """A step used pages or slots of another request, or exceeded a limit."""


@dataclass(frozen=True, slots=True)
class MockLatency:
    """Simulated durations of steps, in seconds.

    Attributes:
      prefill: of any prefill step.
      prefill_token: additional, per token of a prefill step.
      decode: per round of a decode step, for any number of sequences.
      decode_sequence: additional, per round and sequence of a decode step.
    """

    prefill: float = 2e-3
    prefill_token: float = 1e-4
    decode: float = 1e-3
    decode_sequence: float = 1e-5


@dataclass(slots=True)
class _Page:
    """The tokens of a page. `owner` is (model, request, layer, index of the block)."""

    owner: tuple[str, int, int, int]
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Slot:
    """The device state of a slot."""

    request_id: int
    num_cached: int = 0
    written: int = 0
    last_token: int = -1
    remaining: int = 0
    num_output: int = 0
    stop_ids: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class _MockStepHandle:
    result: StepResult


def mock_tokens(
    model: str,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    vocab: int = VOCAB,
    constraint: Constraint | None = None,
) -> list[int]:
    """Returns the tokens of a request, including a stop id that ends it. Advances `constraint`."""
    total = sum(prompt)
    output: list[int] = []
    while len(output) < max_new_tokens:
        token = _next_token(model, total, len(prompt) + len(output), len(output), params, vocab)
        if constraint is not None:
            token = _next_allowed(token, constraint.mask, vocab)
        output.append(token)
        total += token
        if token in stop_ids or (constraint is not None and constraint.advance(token)):
            break
    return output


def _next_token(
    model: str, total: int, length: int, num_output: int, params: SamplingParams, vocab: int
) -> int:
    extra = 0 if params.greedy or params.seed is None else params.seed
    if params.penalized:
        extra += num_output
    return (31 * total + 7 * length + sum(model.encode()) + extra) % vocab


def _next_allowed(token: int, mask: np.ndarray | None, vocab: int) -> int:
    while mask is not None and not mask[token // 32] >> (token % 32) & 1:
        token = (token + 1) % vocab
    return token


class MockExecutor:
    """Runs steps by arithmetic, on a simulated clock.

    Attributes:
      now: simulated time in seconds; `result` moves it to the end of the step.
      latency: simulated durations of steps that are submitted later.
      steps: number of submitted steps.

    Args:
      specs: the models.
      num_pages: of the pool; the first block of the deepest model is the dummy block.
      latency: simulated durations.
      vocab: size of the vocabulary.
    """

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        num_pages: int,
        *,
        latency: MockLatency | None = None,
        vocab: int = VOCAB,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._first_page = max(spec.num_layers for spec in self._specs.values())
        self._replicas = max(spec.replicas for spec in self._specs.values())
        self._num_pages = num_pages
        self.latency = latency or MockLatency()
        self._vocab = vocab
        self._pages: dict[int, _Page] = {}
        self._slots: dict[tuple[str, int], _Slot] = {}
        self._busy_until = 0.0
        self.now = 0.0
        self.steps = 0

    def submit(self, step: Step) -> _MockStepHandle:
        """Runs the step; `result` returns its tokens.

        Raises:
          MockPoolError: it uses pages or slots of another request, or exceeds a limit.
        """
        self.steps += 1
        tokens: list[list[int]] = []
        logprobs: list[list[TokenLogprobs] | None] = []
        prompt: list[list[TokenLogprobs]] = []
        if isinstance(step, Prefill):
            self._check_prefill(step)
            for chunk in step.chunks:
                tokens.append(self._run_chunk(step.model, chunk))
                logprobs.append(self._logprobs(step.model, chunk.slot, tokens[-1]))
                prompt.append(self._token_logprobs(chunk.following, chunk.prompt_logprobs))
            seconds = self.latency.prefill + self.latency.prefill_token * step.num_tokens
        else:
            self._check_decode(step)
            for sequence in step.sequences:
                tokens.append(self._run_sequence(step.model, sequence, step.num_tokens))
                logprobs.append(self._logprobs(step.model, sequence.slot, tokens[-1]))
            round_seconds = self.latency.decode + self.latency.decode_sequence * len(step.sequences)
            seconds = round_seconds * max(1, max(map(len, tokens)))
        started = max(self.now, self._busy_until)
        self._busy_until = started + seconds
        return _MockStepHandle(StepResult(tokens, logprobs, started, seconds, prompt))

    def result(self, handle: _MockStepHandle) -> StepResult:
        """Returns the result of a step, and moves the clock to its end."""
        result = handle.result
        self.now = max(self.now, result.started + result.seconds)
        return result

    def add_model(self, name: str, model: ModelSpec) -> None:
        """See `Executor.add_model`."""
        self._specs[name] = model

    def remove_model(self, name: str) -> None:
        """See `Executor.remove_model`."""
        del self._specs[name]
        for key in [key for key in self._slots if key[0] == name]:
            del self._slots[key]

    def poison(self, pages: Sequence[int]) -> None:
        """Clears pages, so that reading them raises; see `PoisonsPages.poison`."""
        for page in pages:
            for replica in range(self._replicas):
                self._pages.pop(page + replica * self._num_pages, None)

    def close(self) -> None:
        """Clears the pool and the slots."""
        self._pages.clear()
        self._slots.clear()

    # Checks

    def _check_prefill(self, step: Prefill) -> None:
        limits = self._specs[step.model].limits
        _require(0 < len(step.chunks) <= limits.max_prefill_seqs, f"too many chunks: {step}")
        _require(step.num_tokens <= limits.max_prefill_tokens, f"too many tokens: {step}")
        _require(all(chunk.tokens for chunk in step.chunks), f"an empty chunk: {step}")
        self._check_disjoint(step.model, step.chunks)

    def _check_decode(self, step: Decode) -> None:
        limits = self._specs[step.model].limits
        _require(0 < len(step.sequences) <= limits.max_seqs, f"too many sequences: {step}")
        _require(0 < step.num_tokens <= limits.max_decode_tokens, f"too many tokens: {step}")
        masked = any(sequence.mask is not None for sequence in step.sequences)
        _require(not masked or step.num_tokens == 1, f"a mask for more than one token: {step}")
        self._check_disjoint(step.model, step.sequences)

    def _check_disjoint(
        self, model: str, entries: Sequence[PrefillChunk] | Sequence[DecodeSequence]
    ) -> None:
        """Checks that the entries of a step have different slots and pages inside the pool, and
        share no page that one of them writes.
        """
        spec = self._specs[model]
        slots = {entry.slot for entry in entries}
        _require(len(slots) == len(entries), f"a slot is used twice in a step of {model}")
        _require(slots <= set(range(spec.limits.max_seqs)), f"no such slot of {model}: {slots}")
        written: set[int] = set()
        read: set[int] = set()
        for entry in entries:
            position = (
                entry.start if isinstance(entry, PrefillChunk) else self._written(model, entry)
            )
            for index, block in enumerate(entry.blocks[: entry.num_blocks]):
                pages = set(range(block, block + spec.num_layers))
                replica, first = divmod(block, self._num_pages)
                _require(
                    self._first_page <= first
                    and first + spec.num_layers <= self._num_pages
                    and replica == entry.slot % spec.replicas,
                    f"block at page {block} of {model} is outside the pool of its replica",
                )
                writes = index >= position // spec.tokens_per_page
                others = written | read if writes else written
                _require(not others & pages, f"a page of block {block} of {model} is used twice")
                (written if writes else read).update(pages)

    def _written(self, model: str, sequence: DecodeSequence) -> int:
        """Returns the number of tokens of a sequence that are in the pool."""
        return self._slots[model, sequence.slot].written

    # The model

    def _run_chunk(self, model: str, chunk: PrefillChunk) -> list[int]:
        if chunk.first:
            self._slots[model, chunk.slot] = _Slot(chunk.request_id, chunk.found, chunk.found)
        slot = self._slots[model, chunk.slot]
        _require(slot.request_id == chunk.request_id, f"slot of another request: {chunk}")
        _require(slot.written == chunk.start, f"chunk out of order: {chunk}")
        blocks = chunk.blocks[: chunk.num_blocks]
        for token in chunk.tokens:
            # As on the device, which counts computed tokens but not those of a cached prefix.
            slot.num_output += slot.written >= chunk.num_prompt_tokens
            self._write(model, slot, blocks, token)
        if chunk.sampling is None:
            return []
        slot.sampling = chunk.sampling
        slot.stop_ids = chunk.stop_ids
        slot.remaining = chunk.remaining_tokens
        _require(slot.remaining > 0, f"no tokens left to generate: {chunk}")
        return [self._sample(model, slot, blocks, chunk.mask)]

    def _run_sequence(self, model: str, sequence: DecodeSequence, num_tokens: int) -> list[int]:
        slot = self._slots[model, sequence.slot]
        _require(slot.request_id == sequence.request_id, f"slot of another request: {sequence}")
        tokens: list[int] = []
        blocks = sequence.blocks[: sequence.num_blocks]
        while slot.remaining and len(tokens) < num_tokens:
            self._write(model, slot, blocks, slot.last_token)
            tokens.append(self._sample(model, slot, blocks, sequence.mask))
        _require(len(tokens) <= sequence.num_tokens, f"too many tokens: {sequence}")
        return tokens

    def _sample(
        self, model: str, slot: _Slot, blocks: Sequence[int], mask: np.ndarray | None
    ) -> int:
        total = self._read(model, slot, blocks)
        token = _next_token(model, total, slot.written, slot.num_output, slot.sampling, self._vocab)
        token = _next_allowed(token, mask, self._vocab)
        slot.last_token = token
        slot.num_output += 1
        slot.remaining = 0 if token in slot.stop_ids else slot.remaining - 1
        return token

    def _write(self, model: str, slot: _Slot, blocks: Sequence[int], token: int) -> None:
        spec = self._specs[model]
        index, row = divmod(slot.written, spec.tokens_per_page)
        _require(index < len(blocks), f"no block for token {slot.written} of {slot.request_id}")
        for layer in range(spec.num_layers):
            owner = (model, slot.request_id, layer, index)
            if row == 0:
                self._pages[blocks[index] + layer] = _Page(owner)
            self._page(blocks[index] + layer, owner, row).tokens.append(token)
        slot.written += 1

    def _read(self, model: str, slot: _Slot, blocks: Sequence[int]) -> int:
        """Returns the sum of the sequence's tokens, read from the last layer in the pool."""
        spec = self._specs[model]
        per_page = spec.tokens_per_page
        total = 0
        for layer in range(spec.num_layers):
            total = 0
            for index in range(spec.blocks_for(slot.written)):
                num_tokens = min(per_page, slot.written - index * per_page)
                cached = index * per_page < slot.num_cached
                owner = (model, -1 if cached else slot.request_id, layer, index)
                total += sum(self._page(blocks[index] + layer, owner, num_tokens).tokens)
        return total

    def _page(self, number: int, owner: tuple[str, int, int, int], num_tokens: int) -> _Page:
        """Returns a page after a check of its owner; request -1 is any request (cached prefix)."""
        page = self._pages.get(number)
        model, request_id, layer, index = owner
        expected = owner
        if page is not None and request_id < 0:
            expected = (model, page.owner[1], layer, index)
        if page is None or page.owner != expected or len(page.tokens) != num_tokens:
            raise MockPoolError(
                f"page {number} should hold {num_tokens} tokens of {owner}, not {page}"
            )
        return page

    def _logprobs(self, model: str, slot: int, tokens: Sequence[int]) -> list[TokenLogprobs] | None:
        """Returns the log-probabilities of a slot's tokens; None if not requested."""
        num_top = self._slots[model, slot].sampling.logprobs
        if num_top is None or not tokens:
            return None
        return self._token_logprobs(tokens, num_top)

    def _token_logprobs(self, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        """Returns -(token % 10) for each token; alternatives decrease from there by 1."""
        return [
            TokenLogprobs(
                -float(token % 10),
                [((token + i) % self._vocab, -float(token % 10 + i)) for i in range(num_top)],
            )
            for token in tokens
        ]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise MockPoolError(message)
