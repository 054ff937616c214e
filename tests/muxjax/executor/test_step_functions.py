"""Prefill and decode of a tiny model, against the same model without a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax import SamplingParams
from muxjax.executor.slot_state import SlotState
from muxjax.executor.step_functions import StepFunctions, StepOutput
from muxjax.executor.step_inputs import Column, empty_bias, mask_words, pack_chunk
from muxjax.models.checkpoints.loading import open_checkpoint
from muxjax.models.nn.decoder import Decoder
from muxjax.pallas_kernels import KVLayout
from muxjax.scheduling.steps import PrefillChunk
from tests.muxjax.tiny_fleets import entry

VOCAB = 20
LAYERS = 3
MAX_SEQS = 3
BLOCKS = 4
PAGE_TOKENS = 4
LAYOUT = KVLayout(rows=PAGE_TOKENS, num_kv_heads=2, head_dim=32)
GREEDY = SamplingParams(temperature=0.0)
PROMPT = [3, 1, 4, 1, 5, 9]
ALLOW_ALL = np.uint32(2**32 - 1)
BLOCK_TABLE = [LAYERS, 2 * LAYERS, 3 * LAYERS]  # the first block is the dummy block
PREFILL_TOKENS = 8


class Runner:
    """A model with its pool and slots; steps have two rows, of which one may be padding."""

    def __init__(self) -> None:
        model = entry("llama")
        checkpoint = open_checkpoint(
            model["source"],
            config_mapping={**model["config"], "vocab_size": VOCAB, "eos_token_id": VOCAB - 1},
            progress=False,
        )
        params = {name: jnp.asarray(value) for name, value in checkpoint.weights()}
        self.decoder = Decoder(checkpoint.config, params)
        functions = StepFunctions(LAYOUT, max_decode_tokens=4, implementation="xla")
        self._prefill = jax.jit(lambda *arguments: functions.prefill(self.decoder, *arguments))
        self._decode = jax.jit(lambda *arguments: functions.decode(self.decoder, *arguments))
        self.reset()

    def reset(self) -> None:
        self.kv = jnp.zeros((LAYERS * BLOCKS, LAYOUT.rows, 128), jnp.float32)
        self.state = SlotState.create(MAX_SEQS, VOCAB)

    def prefill(
        self, chunk: PrefillChunk, *, targets: Sequence[int] = (), mask: np.ndarray | None = None
    ) -> StepOutput:
        tokens = np.zeros(PREFILL_TOKENS, np.int32)
        tokens[: len(chunk.tokens)] = chunk.tokens
        packed = np.zeros((2, Column.BLOCKS + BLOCKS), np.int32)
        packed[:, Column.SLOT] = MAX_SEQS
        packed[:, Column.STOP_IDS : Column.BLOCKS] = -1
        pack_chunk(packed[0], chunk)
        packed[0, Column.BLOCKS : Column.BLOCKS + len(BLOCK_TABLE)] = BLOCK_TABLE
        all_targets = np.full(PREFILL_TOKENS, -1, np.int32)
        all_targets[: len(targets)] = targets
        self.kv, self.state, output = self._prefill(
            self.kv, self.state, tokens, packed, all_targets, empty_bias(2), masks(mask)
        )
        return output

    def decode(self, slot: int, num_tokens: int, *, mask: np.ndarray | None = None) -> StepOutput:
        packed = np.zeros((2, 1 + BLOCKS), np.int32)
        packed[:, 0] = slot, MAX_SEQS
        packed[0, 1 : 1 + len(BLOCK_TABLE)] = BLOCK_TABLE
        self.kv, self.state, output = self._decode(
            self.kv, self.state, packed, masks(mask), np.int32(num_tokens)
        )
        return output

    def dense_logits(self, tokens: list[int]) -> np.ndarray:
        """Logits after each token, without a pool."""
        padded = jnp.asarray([tokens + [0] * (16 - len(tokens))])
        return np.asarray(self.decoder.dense_logits(padded))[0, : len(tokens)]

    def dense_greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.dense_logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def masks(first: np.ndarray | None) -> np.ndarray:
    """The masks of two rows; the second allows all tokens."""
    rows = np.full((2, mask_words(VOCAB)), ALLOW_ALL, np.uint32)
    if first is not None:
        rows[0] = first
    return rows


def chunk(tokens: list[int] = PROMPT, start: int = 0, **fields: Any) -> PrefillChunk:
    values = {"sampling": GREEDY, "max_new_tokens": 5, **fields}
    return PrefillChunk(
        request_id=7,
        slot=1,
        tokens=tuple(tokens),
        start=start,
        num_prompt_tokens=len(PROMPT),
        blocks=BLOCK_TABLE,
        num_blocks=len(BLOCK_TABLE),
        **values,
    )


@pytest.fixture(scope="module")
def shared_runner() -> Runner:
    return Runner()


@pytest.fixture
def runner(shared_runner: Runner) -> Runner:
    shared_runner.reset()
    return shared_runner


def test_prefill_and_decode_match_the_dense_model(runner: Runner) -> None:
    expected = runner.dense_greedy(PROMPT, 5)
    assert runner.prefill(chunk()).tokens.tolist() == [[expected[0], -1]]
    output = runner.decode(slot=1, num_tokens=4)
    assert output.tokens[:, 0].tolist() == expected[1:]
    assert output.tokens[:, 1].tolist() == [-1] * 4
    assert int(runner.state.remaining[1]) == 0
    assert int(runner.state.position[1]) == len(PROMPT) + 4


def test_prefill_in_two_chunks_samples_after_the_last_chunk(runner: Runner) -> None:
    first = runner.prefill(chunk(PROMPT[:4], sampling=None))
    assert first.tokens.tolist() == [[-1, -1]]
    assert int(runner.state.remaining[1]) == 0
    last = runner.prefill(chunk(PROMPT[4:], start=4))
    assert last.tokens.tolist() == [[runner.dense_greedy(PROMPT, 1)[0], -1]]
    assert int(runner.state.remaining[1]) == 4


def test_decode_runs_at_most_num_tokens_rounds(runner: Runner) -> None:
    expected = runner.dense_greedy(PROMPT, 5)
    runner.prefill(chunk())
    assert runner.decode(slot=1, num_tokens=1).tokens[:, 0].tolist() == [expected[1], -1, -1, -1]
    assert runner.decode(slot=1, num_tokens=4).tokens[:, 0].tolist() == [*expected[2:], -1]
    assert runner.decode(slot=1, num_tokens=4).tokens[:, 0].tolist() == [-1] * 4


def test_decode_ends_a_sequence_at_a_stop_token(runner: Runner) -> None:
    expected = runner.dense_greedy(PROMPT, 5)
    length = next(i for i in range(1, 5) if expected[i] not in expected[:i])
    runner.prefill(chunk(stop_ids=(expected[length],)))
    tokens = runner.decode(slot=1, num_tokens=4).tokens[:, 0].tolist()
    assert tokens[:length] == expected[1 : length + 1]
    assert tokens[length:] == [-1] * (4 - length)
    assert int(runner.state.remaining[1]) == 0


def test_prefill_ends_a_request_at_a_stop_token(runner: Runner) -> None:
    (token,) = runner.dense_greedy(PROMPT, 1)
    assert int(runner.prefill(chunk(stop_ids=(token,))).tokens[0, 0]) == token
    assert int(runner.state.remaining[1]) == 0


def test_masks_limit_the_sampled_tokens(runner: Runner) -> None:
    only_13 = np.array([1 << 13], np.uint32)
    only_2 = np.array([1 << 2], np.uint32)
    assert int(runner.prefill(chunk(), mask=only_13).tokens[0, 0]) == 13
    assert int(runner.decode(slot=1, num_tokens=1, mask=only_2).tokens[0, 0]) == 2


def test_slots_count_prompt_and_output_tokens(runner: Runner) -> None:
    expected = runner.dense_greedy(PROMPT, 5)
    runner.prefill(chunk())
    runner.decode(slot=1, num_tokens=4)
    prompt_tokens = np.flatnonzero(np.asarray(runner.state.in_prompt[1]))
    assert prompt_tokens.tolist() == sorted(set(PROMPT))
    counts = np.bincount(expected, minlength=VOCAB)
    np.testing.assert_array_equal(runner.state.counts[1], counts)


def test_the_first_chunk_resets_its_slot(runner: Runner) -> None:
    runner.prefill(chunk())
    runner.decode(slot=1, num_tokens=4)
    runner.prefill(chunk([2, 2], sampling=None))
    assert np.flatnonzero(np.asarray(runner.state.in_prompt[1])).tolist() == [2]
    assert not np.asarray(runner.state.counts[1]).any()


def test_steps_do_not_change_other_slots(runner: Runner) -> None:
    before = jax.tree.map(lambda leaf: np.asarray(leaf)[[0, 2]], runner.state)
    runner.prefill(chunk())
    runner.decode(slot=1, num_tokens=4)
    after = jax.tree.map(lambda leaf: np.asarray(leaf)[[0, 2]], runner.state)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_logprobs_of_output_and_prompt_match_the_dense_model(runner: Runner) -> None:
    params = SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=0)
    output = runner.prefill(chunk(sampling=params), targets=PROMPT[1:])
    expected = np.asarray(jax.nn.log_softmax(runner.dense_logits(PROMPT)))
    (token,) = runner.dense_greedy(PROMPT, 1)
    assert float(output.logprobs.chosen[0, 0]) == pytest.approx(expected[-1, token], abs=1e-4)
    assert output.logprobs.top_ids[0, 0, :2].tolist() == np.argsort(-expected[-1])[:2].tolist()
    prompt_length = len(PROMPT) - 1
    np.testing.assert_allclose(
        output.prompt.chosen[:prompt_length],
        expected[np.arange(prompt_length), PROMPT[1:]],
        atol=1e-4,
    )


def test_logprobs_are_zeros_if_not_requested(runner: Runner) -> None:
    output = runner.prefill(chunk())
    assert not np.asarray(output.logprobs.chosen).any()
    assert not np.asarray(output.prompt.chosen).any()
