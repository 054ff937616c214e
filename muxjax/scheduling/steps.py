"""The interface between the scheduler and the executor of compiled steps.

The scheduler builds `Step`s, an `Executor` runs them and returns `StepResult`s. Steps run in the
order in which they were submitted, so freed pages may be allocated to a later step while an older
step that still refers to them is in flight.

An executor keeps on the device, per model and slot (`0 <= slot < BucketLimits.max_seqs`): last
token, position, remaining token count, stop ids, sampling parameters, counts of tokens seen.

- The first chunk of a request resets its slot: block table and token counts of the slot's previous
  request are dropped. Chunks of a request are submitted in order. Tokens before the first chunk
  (`found`) are in the pool already, in blocks that other requests may read too; nothing is written
  to these.
- The last chunk of a request (`chunk.last`) samples one token. The pool then holds the
  `chunk.end` tokens of the prefix; the sampled token is written by the decode that follows. The
  slot is done at once if that token is a stop id or `remaining_tokens` was 1.
- A decode of `k` tokens runs each live slot for at most `k` tokens: it writes the last token at the
  next position, samples, and so on. A slot that samples a stop id or uses up its count is done: it
  yields no further token, even in steps that were submitted already, and its writes go to the dummy
  block. A live slot yields exactly `min(k, remaining)` tokens unless it samples a stop id.
- A preempted request is resumed by a prefill of its prompt and emitted tokens.
- Sampled tokens are allowed by the `mask` of their chunk or sequence. A mask holds for the next
  token only, so a decode with a mask has one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

import numpy as np

from muxjax.sampling_params import SamplingParams

STEPS_AHEAD = 2
"""Maximum number of steps in flight if steps run one at a time: the running one and the next."""


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of one request's prefix, to be written to the pool.

    Attributes:
      request_id: the request.
      slot: the device slot that the request holds.
      tokens: the tokens of this chunk, at positions `start` to `end - 1`.
      start: the position of `tokens[0]`; `found` in a request's first chunk.
      num_prompt_tokens: length of the prompt; later tokens were emitted before the request was
        preempted.
      blocks: first page of each block. The request's own list, not a copy: only the first
        `num_blocks` entries belong to this step. The list may grow later, its entries never change.
      num_blocks: number of entries of `blocks` that cover positions 0 to `end - 1`.
      sampling: set only in the last chunk, where the first token is sampled and the slot filled.
      max_new_tokens: maximum number of output tokens of the request, those emitted before a
        preemption included.
      stop_ids: tokens that end the request (the last one emitted is the stop id itself).
      mask: in the last chunk, the tokens that may be sampled (`constraint.py`); None allows all.
      following: the prompt token after each of `tokens`, if their log-probabilities are requested;
        one shorter than `tokens` in a chunk that ends the prompt.
      prompt_logprobs: number of alternatives to report for each of `following`.
      found: number of tokens of the prefix that were in the pool already.
    """

    request_id: int
    slot: int
    tokens: tuple[int, ...]
    start: int
    num_prompt_tokens: int
    blocks: Sequence[int]
    num_blocks: int
    sampling: SamplingParams | None = None
    max_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    mask: np.ndarray | None = None
    following: tuple[int, ...] = ()
    prompt_logprobs: int = 0
    found: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the first computed chunk of the prefix."""
        return self.start == self.found

    @property
    def end(self) -> int:
        """Tokens of the request in the pool once this chunk has run."""
        return self.start + len(self.tokens)

    @property
    def last(self) -> bool:
        """Whether this chunk ends the prefix, so that a token is sampled."""
        return self.sampling is not None

    @property
    def remaining_tokens(self) -> int:
        """In the last chunk: tokens still to generate, the one sampled here included."""
        return self.max_new_tokens - (self.end - self.num_prompt_tokens)


@dataclass(frozen=True, slots=True)
class Prefill:
    """Chunks of one model's prefixes, packed (ragged) into one compiled call."""

    model: str
    chunks: Sequence[PrefillChunk]

    @property
    def num_tokens(self) -> int:
        """`T`: tokens of all chunks, at most `BucketLimits.max_prefill_tokens`."""
        return sum(len(chunk.tokens) for chunk in self.chunks)


class DecodeSequence(NamedTuple):
    """A sequence of a decode step. A tuple, since hundreds are created a step.

    Attributes:
      request_id: the request.
      slot: the device slot that the request holds.
      blocks: as in `PrefillChunk`.
      num_blocks: number of entries of `blocks` that belong to this step. They cover all tokens that
        the sequence may have after it: known tokens, tokens in flight, and those of this step.
      num_tokens: upper bound of the tokens that this sequence yields: the step's `k`, or less if
        the request has fewer left after the steps in flight.
      mask: the tokens that may be sampled; None allows all.
    """

    request_id: int
    slot: int
    blocks: Sequence[int]
    num_blocks: int
    num_tokens: int
    mask: np.ndarray | None = None


class DecodeBatch(Sequence[DecodeSequence]):
    """The sequences of a decode step as columns. As a sequence it yields `DecodeSequence`s.

    Attributes:
      ids, slots, num_blocks, num_tokens: int64 `[S]`, the fields of each `DecodeSequence`.
      blocks: the list of blocks of each sequence.
      masks: the mask of each sequence, or None; None for the column if no sequence has a mask.
    """

    __slots__ = ("blocks", "ids", "masks", "num_blocks", "num_tokens", "slots")

    def __init__(
        self,
        ids: np.ndarray,
        slots: np.ndarray,
        blocks: Sequence[Sequence[int]],
        num_blocks: np.ndarray,
        num_tokens: np.ndarray,
        masks: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        self.ids = ids
        self.slots = slots
        self.blocks = blocks
        self.num_blocks = num_blocks
        self.num_tokens = num_tokens
        self.masks = masks

    @classmethod
    def from_sequences(cls, sequences: Iterable[DecodeSequence]) -> DecodeBatch:
        """Converts sequences to columns; returns the argument if it is a `DecodeBatch` already."""
        if isinstance(sequences, DecodeBatch):
            return sequences
        ids, slots, blocks, num_blocks, num_tokens, masks = zip(*sequences, strict=True)
        return cls(
            np.array(ids, np.int64),
            np.array(slots, np.int64),
            blocks,
            np.array(num_blocks, np.int64),
            np.array(num_tokens, np.int64),
            masks,
        )

    def __len__(self) -> int:
        return len(self.blocks)

    @overload
    def __getitem__(self, index: int) -> DecodeSequence: ...

    @overload
    def __getitem__(self, index: slice) -> list[DecodeSequence]: ...

    def __getitem__(self, index: int | slice) -> DecodeSequence | list[DecodeSequence]:
        if isinstance(index, slice):
            return list(self)[index]
        return DecodeSequence(
            int(self.ids[index]),
            int(self.slots[index]),
            self.blocks[index],
            int(self.num_blocks[index]),
            int(self.num_tokens[index]),
            None if self.masks is None else self.masks[index],
        )

    def __iter__(self) -> Iterator[DecodeSequence]:
        return map(
            DecodeSequence,
            self.ids.tolist(),
            self.slots.tolist(),
            self.blocks,
            self.num_blocks.tolist(),
            self.num_tokens.tolist(),
            repeat(None) if self.masks is None else self.masks,
        )


@dataclass(frozen=True, slots=True)
class Decode:
    """A decode of up to `num_tokens` (`k`) tokens for each of a model's sequences."""

    model: str
    sequences: Sequence[DecodeSequence]
    num_tokens: int


type Step = Prefill | Decode


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of an emitted token, and the most likely tokens with theirs, best first."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of a step.

    Attributes:
      tokens: for each chunk or sequence, in the step's order, the tokens it emitted: none for a
        chunk that is not its request's last, 0 to k for a sequence.
      logprobs: for each chunk or sequence one entry per token, or None if not requested.
      started: when the device began the step, in seconds on the executor's clock.
      seconds: device time of the step.
      prompt_logprobs: for each chunk one entry for each of its `following`; empty if no chunk has
        any.
    """

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None]
    started: float
    seconds: float
    prompt_logprobs: Sequence[list[TokenLogprobs]] = ()


type Handle = Any
"""A step that was submitted, as `Executor.submit` returns it; opaque to other classes."""

type ExecutorModel = Any
"""The data that an executor needs to run a model: `executor.model_slots.ModelSlots` for the JAX
executor, a `ModelSpec` for the mock executor, a `SimulatedModel` for the simulated one."""


@runtime_checkable
class Executor(Protocol):
    """Runs steps in order. The scheduler treats real, simulated and mock executors alike."""

    def submit(self, step: Step) -> Handle:
        """Queues a step and returns without waiting for it.

        Everything in `step` is read before this returns; the executor keeps no reference to its
        block lists.
        """
        ...

    def result(self, handle: Handle) -> StepResult:
        """Waits for a step and returns its result. Call it once for each handle, in order."""
        ...

    def add_model(self, name: str, model: ExecutorModel) -> None:
        """Adds a model, between two steps.

        Args:
          name: name of the model.
          model: the model. Its slots are allocated beforehand, so that the loop does not wait.
        """
        ...

    def remove_model(self, name: str) -> None:
        """Frees a model's slots, between two steps; no step of the model may be in flight."""
        ...

    def close(self) -> None:
        """Frees the device's memory; nothing may be submitted afterwards."""
        ...


@runtime_checkable
class PoisonsPages(Protocol):
    """The capability of an executor whose pool shows reads of freed pages (test mode)."""

    def poison(self, pages: Sequence[int]) -> None:
        """Fills freed pages with NaN, after all steps submitted so far."""
        ...


@runtime_checkable
class HasPoolAddress(Protocol):
    """The capability of an executor whose pool is one array that is never moved."""

    @property
    def pool_address(self) -> int:
        """Address of the pool's first shard. Valid between two steps."""
        ...
