import dataclasses

import ml_dtypes
import numpy as np
import pytest

from muxjax.models.checkpoints.hf import open_hf, save_hf
from muxjax.models.checkpoints.random_weights import open_random
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import param_shapes
from muxjax.models.nn.shards import Shards

HEADS = [(9, 3), (4, 1), (32, 8), (12, 4), (15, 5), (7, 7), (64, 8)]


def config(heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=50,
        num_layers=1,
        hidden_size=6,
        intermediate_size=21,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=2,
        max_position=64,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=True,
    )


def build_distinct_params(model: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters whose elements are distinct and not zero."""
    params, first = {}, 1
    for name, shape in param_shapes(model).items():
        size = int(np.prod(shape))
        params[name] = np.arange(first, first + size, dtype=np.int64).reshape(shape)
        first += size
    return params


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_shards_have_the_declared_shapes_and_cover_the_parameter(heads, tp_size):
    model = config(*heads)
    shards = Shards(model, tp_size)
    for name, array in build_distinct_params(model).items():
        parts = [shards.shard_param(name, array, device) for device in range(tp_size)]
        assert {shard.shape for shard in parts} == {shards.shapes[name]}
        values = {int(value) for shard in parts for value in shard.ravel()}
        assert values - {0} == set(array.ravel().tolist())


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", HEADS)
def test_query_heads_are_on_one_device_with_their_kv_head(heads, tp_size):
    """A query head's rows of `qkv`, its KV head and its columns of `o` are on one device."""
    model = config(*heads)
    shards, local = Shards(model, tp_size), Shards(model, tp_size).local
    H, group = model.head_dim, model.num_heads // model.num_kv_heads
    head_of_row = np.repeat(np.arange(model.num_heads + 2 * model.num_kv_heads), H) + 1
    qkv = np.repeat(head_of_row[:, None], model.hidden_size, axis=1)
    o = np.repeat((np.repeat(np.arange(model.num_heads), H) + 1)[None], model.hidden_size, axis=0)
    seen = []
    for device in range(tp_size):
        rows = shards.shard_param("layers.0.qkv", qkv, device)[::H, 0]
        columns = shards.shard_param("layers.0.o", o, device)[0, ::H]
        queries, keys, values = np.split(rows, [local.num_heads, local.num_heads + shards.kv_heads])
        assert queries.tolist() == columns.tolist()
        for index, query in enumerate(queries.tolist()):
            if query == 0:
                continue
            seen.append(query - 1)
            kv_head = (query - 1) // group
            assert keys[index // shards.queries] == model.num_heads + kv_head + 1
            assert (
                values[index // shards.queries]
                == model.num_heads + model.num_kv_heads + kv_head + 1
            )
    assert sorted(seen) == list(range(model.num_heads))


def test_heads_of_known_models():
    def local_heads(heads: int, kv_heads: int) -> list[tuple[int, int]]:
        sharded = [Shards(config(heads, kv_heads), tp_size) for tp_size in (1, 2, 4, 8)]
        return [(shards.kv_heads, shards.queries) for shards in sharded]

    assert local_heads(9, 3) == [(3, 3), (2, 3), (1, 3), (1, 2)]  # SmolLM2
    assert local_heads(4, 1) == [(1, 4), (1, 2), (1, 1), (1, 1)]  # Gemma 3 270M
    assert local_heads(32, 8) == [(8, 4), (4, 4), (2, 4), (1, 4)]  # Llama 3 8B


def test_tp_size_of_zero_is_rejected():
    with pytest.raises(ValueError, match="tp_size must be at least 1"):
        Shards(config(4, 1), 0)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("heads", [(9, 3), (4, 1)])
def test_read_shard_equals_shard_param(tmp_path, heads, dtype):
    """From safetensors, which reads only the shard, and from a source without slices."""
    random = open_random(dataclasses.replace(config(*heads), qk_norm=False, o_bias=False), "random")
    model = dataclasses.replace(random.config, mlp_bias=False, family="qwen2")
    params = {
        name: array.astype(dtype) for name, array in random.weights() if name in param_shapes(model)
    }
    save_hf(tmp_path, model, params)
    stored = open_hf(tmp_path)
    assert stored.config == model
    for tp_size in (1, 2, 8):
        shards, random_shards = Shards(model, tp_size), Shards(random.config, tp_size)
        for device in range(tp_size):
            for name, array in params.items():
                expected = shards.shard_param(name, array, device)
                shard = stored.read_shard(name, shards, device)
                assert shard.shape == expected.shape
                np.testing.assert_array_equal(shard, expected)
            name = "layers.0.qkv"
            np.testing.assert_array_equal(
                random.read_shard(name, random_shards, device),
                random_shards.shard_param(name, dict(random.weights())[name], device),
            )
