"""Builds isolated steps of any size and context, which `bench.steps` times one at a time."""

from __future__ import annotations

from muxjax.bench.session import BenchSession
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.steps import Decode, DecodeSequence, Prefill, PrefillChunk, Step

_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
_FOREVER = 1 << 20


class StepBatches:
    """Builds steps of one model on pages that no scheduler uses."""

    def __init__(self, session: BenchSession, name: str) -> None:
        self._executor = session.executor
        self._name = name
        self._buckets = session.buckets[name]
        layout, layers = session.models[name].layout, session.models[name].config.num_layers
        self._per_block = layout.tokens_per_page
        self._layers = layers
        self._first = session.dummy_pages
        self._blocks = (session.num_pages - session.dummy_pages) // layers

    def run(self, step: Step, behind: Step | None = None) -> float:
        """Runs a step and returns its duration in seconds, as the executor measures it.

        Args:
          step: the step to time.
          behind: a step that is submitted first, so that both are queued on the device.
        """
        before = None if behind is None else self._executor.submit(behind)
        handle = self._executor.submit(step)
        if before is not None:
            self._executor.result(before)
        return self._executor.result(handle).seconds

    def prefill(self, size: int, chunks: int, context: int, last: bool) -> Prefill:
        """Builds a prefill that fills its bucket; each chunk ends at position `context`."""
        tokens = [size // chunks + (index < size % chunks) for index in range(chunks)]
        return Prefill(
            self._name,
            [
                self._chunk(slot, min(count, context), context, last)
                for slot, count in enumerate(tokens)
            ],
        )

    def prepare_slots(self, sequences: int, context: int) -> list[Prefill]:
        """Builds prefills after which `sequences` slots can decode at position `context`."""
        max_chunks = min(self._buckets.prefill_seqs, self._buckets.prefill_tokens[-1])
        return [
            Prefill(
                self._name,
                [
                    self._chunk(slot, 1, context, True)
                    for slot in range(first, min(sequences, first + max_chunks))
                ],
            )
            for first in range(0, sequences, max_chunks)
        ]

    def decode(self, sequences: int, tokens: int, context: int) -> Decode:
        blocks = -(-context // self._per_block)
        return Decode(
            self._name,
            [
                DecodeSequence(slot, slot, self._table(slot, blocks), blocks, tokens)
                for slot in range(sequences)
            ],
            tokens,
        )

    def _chunk(self, slot: int, tokens: int, end: int, last: bool) -> PrefillChunk:
        blocks = -(-end // self._per_block)
        return PrefillChunk(
            request_id=slot,
            slot=slot,
            tokens=(1,) * tokens,
            start=end - tokens,
            num_prompt_tokens=end,
            blocks=self._table(slot, blocks),
            num_blocks=blocks,
            sampling=_GREEDY if last else None,
            max_new_tokens=_FOREVER,
        )

    def _table(self, slot: int, blocks: int) -> list[int]:
        """The first blocks of a slot's block table.

        In a small pool, slots share blocks; step times do not depend on that.
        """
        longest = self._buckets.blocks
        return [
            self._first + (slot * longest + index) % self._blocks * self._layers
            for index in range(blocks)
        ]
