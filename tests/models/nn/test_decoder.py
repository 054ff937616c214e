"""The decoder against `transformers`, for a tiny random model of every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muxjax.models.nn.attention import PagedAttend
from muxjax.models.nn.decoder import Decoder
from muxjax.models.nn.params import param_shapes
from muxjax.pallas_kernels import AttentionMetadata, KVLayout
from tests import golden

LIMIT = 2e-4


def decoder(case: golden.Tiny) -> Decoder:
    return Decoder(case.config, {name: jnp.asarray(w) for name, w in case.params.items()})


@pytest.mark.parametrize("name", golden.tiny_names())
def test_logits_of_complete_sequences(name):
    case = golden.tiny(name)
    logits = decoder(case).dense_logits(jnp.asarray([case.tokens]))
    assert np.abs(np.asarray(logits[0]) - case.logits).max() < LIMIT


@pytest.mark.parametrize("name", golden.tiny_names())
def test_logits_through_the_pool(name):
    """Two chunks of prefill, then decode steps, in pages initialized with NaN."""
    case = golden.tiny(name)
    config = case.config
    layout = KVLayout(
        24 * KVLayout(10**6, config.num_kv_heads, config.head_dim).rows_per_token // 3,
        config.num_kv_heads,
        config.head_dim,
    )
    per_page = layout.tokens_per_page
    blocks = -(-len(case.tokens) // per_page)
    rng = np.random.default_rng(0)
    table = (1 + rng.permutation(blocks)) * config.num_layers
    kv = jnp.full(((blocks + 1) * config.num_layers, layout.rows, 128), jnp.nan)
    model = decoder(case)

    @nnx.jit(static_argnames="decode")
    def step(model, tokens, positions, kv, decode):
        pages = jnp.asarray(table)[positions // per_page]
        attend = PagedAttend(
            first_rows=pages * layout.rows + positions % per_page * layout.rows_per_token,
            metadata=AttentionMetadata(
                block_tables=jnp.asarray(table)[None],
                kv_lens=positions[-1:] + 1,
                query_starts=jnp.array([0, len(tokens)]),
                layout=layout,
                decode=decode,
            ),
        )
        hidden, kv = model(tokens, positions, kv, attend)
        return model.logits(hidden), kv

    outputs = []
    start = 0
    for size in [7, 9] + [1] * (len(case.tokens) - 16):
        tokens = jnp.asarray(case.tokens[start : start + size])
        logits, kv = step(model, tokens, jnp.arange(start, start + size), kv, size == 1)
        outputs.append(np.asarray(logits))
        start += size
    assert np.abs(np.concatenate(outputs) - case.logits).max() < LIMIT


def test_weights_returns_the_canonical_parameters():
    case = golden.tiny(golden.tiny_names()[0])
    weights = decoder(case).weights()
    assert list(weights) == list(param_shapes(case.config))
    for name, weight in case.params.items():
        np.testing.assert_array_equal(weights[name], weight)


def test_init_depends_on_the_seed():
    config = golden.tiny(golden.tiny_names()[0]).config
    first, same, other = (Decoder.init(config, nnx.Rngs(seed)).weights() for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["embed"], same["embed"])
    assert (first["embed"] != other["embed"]).any()
    assert (first["final_norm"] == 1).all()


def test_missing_or_misshapen_parameters_are_rejected():
    case = golden.tiny(golden.tiny_names()[0])
    params = dict(case.params)
    del params["final_norm"]
    with pytest.raises(ValueError, match="final_norm"):
        Decoder(case.config, params)
    with pytest.raises(ValueError, match="final_norm has shape"):
        Decoder(case.config, {**params, "final_norm": np.ones(3, np.float32)})


def test_gradients_are_finite():
    case = golden.tiny(golden.tiny_names()[0])

    @nnx.jit
    def loss(model):
        return model.dense_logits(jnp.asarray([case.tokens])).sum()

    gradients = nnx.grad(loss)(decoder(case))
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
