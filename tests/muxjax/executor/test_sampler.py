"""The device's sampler against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.executor import sampler
from muxjax.executor.sampler import SamplingArrays

VOCAB = 1200  # more than two chunks of the inverted distribution


def settings(rows: int, **values) -> SamplingArrays:
    defaults = {
        "temperature": 1.0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    arrays = {
        name: jnp.broadcast_to(jnp.asarray(values.get(name, default), jnp.float32), rows)
        for name, default in defaults.items()
    }
    return SamplingArrays(
        **arrays,
        top_k=jnp.broadcast_to(jnp.asarray(values.get("top_k", 0), jnp.int32), rows),
        seed=jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], axis=1),
        logprobs=jnp.full(rows, -1, jnp.int32),
        stop_from=jnp.zeros(rows, jnp.int32),
    )


def logits(rows: int = 1, seed: int = 0, scale: float = 3.0) -> jax.Array:
    values = scale * np.random.default_rng(seed).standard_normal((rows, VOCAB))
    return jnp.asarray(values, jnp.float32)


sample = jax.jit(sampler.sample)


def draw(row: jax.Array, count: int, **values) -> np.ndarray:
    """Tokens of `count` rows with the same logits and different seeds."""
    rows = jnp.broadcast_to(row, (count, VOCAB))
    return np.asarray(
        sample(rows, settings(count, **values), jnp.zeros(count, jnp.int32), jnp.ones(count, bool))
    )


def test_temperature_zero_selects_the_first_maximum():
    rows = logits(3).at[1, 7].set(99.0).at[1, 900].set(99.0)
    out = sample(rows, settings(3, temperature=0.0), jnp.zeros(3, jnp.int32), jnp.ones(3, bool))
    np.testing.assert_array_equal(out, np.asarray(rows).argmax(axis=1))
    assert out[1] == 7


def test_draws_follow_the_distribution():
    row = logits()[0]
    tokens = draw(row, 4000, temperature=1.5)
    expected = np.asarray(jax.nn.softmax(row / 1.5), np.float64)
    top = np.argsort(-expected)[:20]
    share = np.array([(tokens == token).mean() for token in top])
    assert np.abs(share - expected[top]).max() < 4 * np.sqrt(expected[top].max() / 4000)


@pytest.mark.parametrize("k", [1, 2, 17, VOCAB, 5 * VOCAB])
def test_top_k_keeps_the_k_most_likely(k):
    row = logits()[0]
    best = set(np.argsort(-np.asarray(row))[:k].tolist())
    tokens = set(draw(row, 500, temperature=3.0, top_k=k).tolist())
    assert tokens <= best
    if k <= 2:
        assert tokens == best


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9])
def test_top_p_keeps_the_nucleus(p):
    row = logits(scale=1.0)[0]
    weights = np.asarray(jax.nn.softmax(row), np.float64)
    order = np.argsort(-weights)
    size = int(np.searchsorted(np.cumsum(weights[order]), p)) + 1
    tokens = set(draw(row, 2000, top_p=p).tolist())
    assert tokens <= set(order[:size].tolist())
    if p < 0.1:
        assert len(tokens) > size // 2


def test_top_p_applies_to_the_tokens_that_top_k_keeps():
    row = jnp.full(VOCAB, -20.0).at[:4].set(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])))
    # Of 0.4 and 0.3, the first has 4/7, which is above one half.
    assert set(draw(row, 200, top_k=2, top_p=0.5).tolist()) == {0}
    assert set(draw(row, 200, top_p=0.5).tolist()) == {0, 1}


def test_min_p_is_relative_to_the_most_likely():
    row = jnp.full(VOCAB, -20.0).at[:4].set(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])))
    assert set(draw(row, 500, min_p=0.2).tolist()) == {0, 1, 2}


def test_a_row_does_not_depend_on_other_rows():
    rows = logits(6, seed=3)
    seeds = settings(6, temperature=1.2, top_p=[1, 0.9, 1, 0.5, 1, 1], top_k=[0, 0, 9, 0, 0, 0])
    positions = jnp.arange(6, dtype=jnp.int32)
    batched = sample(rows, seeds, positions, jnp.ones(6, bool))
    for row in range(6):
        row_settings = jax.tree.map(lambda x, row=row: x[row : row + 1], seeds)
        isolated = sample(
            rows[row : row + 1], row_settings, positions[row : row + 1], jnp.ones(1, bool)
        )
        assert int(isolated[0]) == int(batched[row])


def test_tokens_depend_on_positions_and_seeds():
    rows = jnp.zeros((64, VOCAB))
    live = jnp.ones(64, bool)
    first = sample(rows, settings(64), jnp.zeros(64, jnp.int32), live)
    second = sample(rows, settings(64), jnp.ones(64, jnp.int32), live)
    assert len(set(np.asarray(first).tolist())) > 50
    assert (first != second).sum() > 50


def test_extreme_logits_stay_in_the_vocabulary():
    for row in (jnp.full(VOCAB, -jnp.inf).at[1199].set(0.0), jnp.zeros(VOCAB).at[3].set(1e30)):
        tokens = draw(row, 50, temperature=0.01, top_p=0.99, top_k=50)
        assert set(tokens.tolist()) == {int(row.argmax())}


def test_penalties():
    row = jnp.zeros((1, VOCAB)).at[0, :4].set(jnp.array([2.0, -2.0, 3.0, 1.0]))
    in_prompt = jnp.zeros((1, VOCAB), bool).at[0, :2].set(True)
    counts = jnp.zeros((1, VOCAB), jnp.int32).at[0, 2].set(3)
    out = sampler.penalize(
        row,
        settings(1, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25),
        in_prompt,
        counts,
    )
    np.testing.assert_allclose(out[0, :5], [1.0, -4.0, 1.5 - 0.75 - 0.5, 1.0, 0.0])


@pytest.mark.parametrize("vocab", [VOCAB, 7])
def test_logprobs(vocab):
    rows = logits(2)[:, :vocab]
    logprobs = sampler.logprobs(rows, jnp.array([3, 4]), jnp.array(True))
    expected = np.asarray(jax.nn.log_softmax(rows))
    np.testing.assert_allclose(logprobs.chosen, expected[[0, 1], [3, 4]], rtol=1e-5)
    size = min(20, vocab)
    order = np.argsort(-expected, axis=1)[:, :size]
    np.testing.assert_array_equal(logprobs.top_ids[:, :size], order)
    assert np.isneginf(logprobs.top[:, size:]).all()
    skipped = sampler.logprobs(rows, jnp.array([3, 4]), jnp.array(False))
    assert (skipped.top == 0).all()
