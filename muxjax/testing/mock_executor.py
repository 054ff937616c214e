"""An executor whose model is arithmetic that can be done on paper.

The next token of a sequence is

    (31 * sum of all its tokens + 7 * their number + salt + extra) % vocab

where `salt` is the sum of the bytes of the model's name and `extra` is the seed of a request that
is sampled, plus the number of tokens it has put out if it has a penalty. With a mask it is the next
one, in a circle, that is allowed. `mock_tokens` gives what a request gets when it is alone.

Tokens are written to a simulated pool through the block tables as the step gives them, in all
layers, and read back through the block tables for each token sampled. A wrong, overlapping or
poisoned page thus raises `MockPoolError` or changes the tokens. Slots hold state as on the device
(`steps.py`).
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
    """A step used pages or slots that are not its own."""


@dataclass(frozen=True, slots=True)
class MockLatency:
    """Simulated seconds of steps.

    Attributes:
      prefill: of any prefill step.
      prefill_token: of each of its tokens besides.
      decode: of each token of a decode step, whatever the batch.
      decode_sequence: of each sequence of a decode step besides, a token.
    """

    prefill: float = 2e-3
    prefill_token: float = 1e-4
    decode: float = 1e-3
    decode_sequence: float = 1e-5


@dataclass(slots=True)
class _Page:
    """A page's tokens. `owner` is (model, request, layer, index of the block in the sequence)."""

    owner: tuple[str, int, int, int]
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Slot:
    """What the device keeps for a slot."""

    request_id: int
    found: int = 0
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
    """The tokens that a request gets, a stop id that ends it included. Advances `constraint`."""
    total = sum(prompt)
    output: list[int] = []
    while len(output) < max_new_tokens:
        token = _next_token(model, total, len(prompt) + len(output), len(output), params, vocab)
        if constraint is not None:
            token = _allowed(token, constraint.mask, vocab)
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


def _allowed(token: int, mask: np.ndarray | None, vocab: int) -> int:
    while mask is not None and not mask[token // 32] >> (token % 32) & 1:
        token = (token + 1) % vocab
    return token


class MockExecutor:
    """Runs steps by arithmetic, on a simulated clock.

    Attributes:
      now: simulated seconds; `result` moves it to the end of the step.
      latency: simulated durations, of steps submitted from now on.
      steps: how many steps were submitted.

    Args:
      specs: the models.
      num_pages: pages of the pool; the first block of the deepest model is the dummy block.
      latency: simulated durations.
      vocab: how many tokens there are.
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
        self._num_pages = num_pages
        self.latency = latency or MockLatency()
        self._vocab = vocab
        self._pages: dict[int, _Page] = {}
        self._slots: dict[tuple[str, int], _Slot] = {}
        self._busy_until = 0.0
        self.now = 0.0
        self.steps = 0

    def submit(self, step: Step) -> _MockStepHandle:
        """Runs the step; its tokens are there to be read when `result` is called.

        Raises:
          MockPoolError: it uses pages or slots that are not its own, or breaks a limit.
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
                prompt.append(self._each(chunk.following, chunk.prompt_logprobs))
            seconds = self.latency.prefill + self.latency.prefill_token * step.num_tokens
        else:
            self._check_decode(step)
            for sequence in step.sequences:
                tokens.append(self._run_sequence(step.model, sequence, step.num_tokens))
                logprobs.append(self._logprobs(step.model, sequence.slot, tokens[-1]))
            each = self.latency.decode + self.latency.decode_sequence * len(step.sequences)
            seconds = each * max(1, max(map(len, tokens)))
        started = max(self.now, self._busy_until)
        self._busy_until = started + seconds
        return _MockStepHandle(StepResult(tokens, logprobs, started, seconds, prompt))

    def result(self, handle: _MockStepHandle) -> StepResult:
        """What the step gave; the clock moves to its end."""
        result = handle.result
        self.now = max(self.now, result.started + result.seconds)
        return result

    def poison(self, pages: Sequence[int]) -> None:
        """Empties pages, so that reading them raises."""
        replicas = max(spec.replicas for spec in self._specs.values())
        for page in pages:
            for copy in range(replicas):
                self._pages.pop(page + copy * self._num_pages, None)

    def close(self) -> None:
        """Forgets the pool."""
        self._pages.clear()
        self._slots.clear()

    # Checks

    def _check_prefill(self, step: Prefill) -> None:
        limits = self._specs[step.model].limits
        _require(0 < len(step.chunks) <= limits.max_prefill_seqs, f"too many chunks: {step}")
        _require(step.num_tokens <= limits.max_prefill_tokens, f"too many tokens: {step}")
        _require(all(chunk.tokens for chunk in step.chunks), f"an empty chunk: {step}")
        self._check_apart(step.model, step.chunks)

    def _check_decode(self, step: Decode) -> None:
        limits = self._specs[step.model].limits
        _require(0 < len(step.sequences) <= limits.max_seqs, f"too many sequences: {step}")
        _require(0 < step.num_tokens <= limits.max_decode_tokens, f"too many tokens: {step}")
        masked = any(sequence.mask is not None for sequence in step.sequences)
        _require(not masked or step.num_tokens == 1, f"a mask for more than one token: {step}")
        self._check_apart(step.model, step.sequences)

    def _check_apart(
        self, model: str, entries: Sequence[PrefillChunk] | Sequence[DecodeSequence]
    ) -> None:
        """No two entries of a step share a slot, none has a page that another writes to, and all
        pages are in the pool.
        """
        spec = self._specs[model]
        slots = {entry.slot for entry in entries}
        _require(len(slots) == len(entries), f"slots used twice in a step of {model}")
        _require(slots <= set(range(spec.limits.max_seqs)), f"no such slot of {model}: {slots}")
        written: set[int] = set()
        read: set[int] = set()
        for entry in entries:
            at = entry.start if isinstance(entry, PrefillChunk) else self._written(model, entry)
            for index, block in enumerate(entry.blocks[: entry.num_blocks]):
                pages = set(range(block, block + spec.num_layers))
                copy, first = divmod(block, self._num_pages)
                _require(
                    self._first_page <= first
                    and first + spec.num_layers <= self._num_pages
                    and copy == entry.slot % spec.replicas,
                    f"block at page {block} of {model} is outside the pool of its copy",
                )
                writes = index >= at // spec.tokens_per_page
                others = written | read if writes else written
                _require(not others & pages, f"page of block {block} used twice by {model}")
                (written if writes else read).update(pages)

    def _written(self, model: str, sequence: DecodeSequence) -> int:
        """Tokens of a sequence that are in the pool."""
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
            # As on the device, which counts what it is given: a prefix that was found is not seen.
            slot.num_output += slot.written >= chunk.num_prompt_tokens
            self._write(model, slot, blocks, token)
        if chunk.sampling is None:
            return []
        slot.sampling = chunk.sampling
        slot.stop_ids = chunk.stop_ids
        slot.remaining = chunk.remaining_tokens
        _require(slot.remaining > 0, f"nothing left to make: {chunk}")
        return [self._sample(model, slot, blocks, chunk.mask)]

    def _run_sequence(self, model: str, sequence: DecodeSequence, num_tokens: int) -> list[int]:
        slot = self._slots[model, sequence.slot]
        _require(slot.request_id == sequence.request_id, f"slot of another request: {sequence}")
        made: list[int] = []
        blocks = sequence.blocks[: sequence.num_blocks]
        while slot.remaining and len(made) < num_tokens:
            self._write(model, slot, blocks, slot.last_token)
            made.append(self._sample(model, slot, blocks, sequence.mask))
        _require(len(made) <= sequence.num_tokens, f"more tokens than the host expects: {sequence}")
        return made

    def _sample(
        self, model: str, slot: _Slot, blocks: Sequence[int], mask: np.ndarray | None
    ) -> int:
        total = self._read(model, slot, blocks)
        token = _next_token(model, total, slot.written, slot.num_output, slot.sampling, self._vocab)
        token = _allowed(token, mask, self._vocab)
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
        """The sum of the sequence's tokens as the pool has them, in the last layer."""
        spec = self._specs[model]
        per_page = spec.tokens_per_page
        total = 0
        for layer in range(spec.num_layers):
            total = 0
            for index in range(spec.blocks_for(slot.written)):
                held = min(per_page, slot.written - index * per_page)
                found = index * per_page < slot.found
                owner = (model, -1 if found else slot.request_id, layer, index)
                total += sum(self._page(blocks[index] + layer, owner, held).tokens)
        return total

    def _page(self, number: int, owner: tuple[str, int, int, int], held: int) -> _Page:
        """A page with its owner as expected; request -1 stands for any: the block was found."""
        page = self._pages.get(number)
        model, request_id, *place = owner
        expected = owner
        if page is not None and request_id < 0:
            expected = (model, page.owner[1], place[0], place[1])
        if page is None or page.owner != expected or len(page.tokens) != held:
            raise MockPoolError(f"page {number} should hold {held} tokens of {owner}, not {page}")
        return page

    def _logprobs(self, model: str, slot: int, tokens: Sequence[int]) -> list[TokenLogprobs] | None:
        """The chosen token gets -(token % 10), each alternative one less than the one before."""
        wanted = self._slots[model, slot].sampling.logprobs
        if wanted is None or not tokens:
            return None
        return self._each(tokens, wanted)

    def _each(self, tokens: Sequence[int], wanted: int) -> list[TokenLogprobs]:
        return [
            TokenLogprobs(
                -float(token % 10),
                [((token + i) % self._vocab, -float(token % 10 + i)) for i in range(wanted)],
            )
            for token in tokens
        ]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise MockPoolError(message)
