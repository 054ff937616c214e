import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.models.checkpoints.random_weights import RandomTensors
from muxjax.models.nn.attention import DenseAttend
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.decoder import Decoder
from muxjax.models.nn.params import param_shapes
from muxjax.models.nn.stacks import Stacks


def config(sliding: list[bool]) -> ModelConfig:
    return ModelConfig(
        family="gemma3",
        vocab_size=50,
        num_layers=len(sliding),
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position=64,
        sliding_window=3,
        layer_is_sliding=tuple(sliding),
        qk_norm=True,
        post_norms=True,
    )


@pytest.mark.parametrize(
    ("sliding", "period", "repeats"),
    [
        ([False] * 5, 1, 5),
        ([True, False] * 3, 2, 3),
        (([True] * 5 + [False]) * 3, 6, 3),
        ([True, True, False, True, True, False, True], 3, 2),
        ([True], 1, 1),
    ],
)
def test_from_config_minimizes_compiled_layers(sliding, period, repeats):
    stacks = Stacks.from_config(config(sliding))
    assert (stacks.period, stacks.repeats) == (period, repeats)


@pytest.mark.parametrize("sliding", [[False] * 3, [True, True, False, True, True, False, True]])
def test_stacked_layers_equal_separate_layers(sliding):
    model = config(sliding)
    stacks = Stacks.from_config(model)
    tensors = RandomTensors(model)
    separate = {name: jnp.asarray(tensors.read(name) * 5) for name in param_shapes(model)}
    stacked = {name: np.zeros(shape, np.float32) for name, shape in stacks.shapes(model).items()}
    for name, array in separate.items():
        stored, index = stacks.locate(name)
        stacked[stored][... if index is None else index] = array
    stacked = jax.tree.map(jnp.asarray, stacked)
    tokens, positions = jnp.arange(6), jnp.arange(6)
    outs = []
    for decoder in (Decoder(model, separate), Decoder(model, stacked, stacks)):
        hidden, _ = jax.jit(lambda t, p, decoder=decoder: decoder(t, p, None, DenseAttend(6)))(
            tokens, positions
        )
        outs.append(np.asarray(hidden))
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-4, atol=1e-4)
    assert np.abs(outs[0]).max() > 0.1
