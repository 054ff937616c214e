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


def numbered(whole: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters of which no two numbers are alike, none zero."""
    found, first = {}, 1
    for name, shape in param_shapes(whole).items():
        size = int(np.prod(shape))
        found[name] = np.arange(first, first + size, dtype=np.int64).reshape(shape)
        first += size
    return found


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_the_parts_are_of_their_shapes_and_miss_nothing(heads, tp_size):
    whole = config(*heads)
    shards = Shards(whole, tp_size)
    for name, array in numbered(whole).items():
        parts = [shards.shard_param(name, array, device) for device in range(tp_size)]
        assert {part.shape for part in parts} == {shards.shapes[name]}
        kept = {int(value) for part in parts for value in part.ravel()}
        assert kept - {0} == set(array.ravel().tolist())


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", HEADS)
def test_queries_stay_with_their_keys_and_outputs(heads, tp_size):
    """Its rows of `qkv`, those of its KV head, its columns of `o`: on one device, and once."""
    whole = config(*heads)
    shards, local = Shards(whole, tp_size), Shards(whole, tp_size).local
    H, group = whole.head_dim, whole.num_heads // whole.num_kv_heads
    head_of_row = np.repeat(np.arange(whole.num_heads + 2 * whole.num_kv_heads), H) + 1
    qkv = np.repeat(head_of_row[:, None], whole.hidden_size, axis=1)
    o = np.repeat((np.repeat(np.arange(whole.num_heads), H) + 1)[None], whole.hidden_size, axis=0)
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
            assert keys[index // shards.queries] == whole.num_heads + kv_head + 1
            assert (
                values[index // shards.queries]
                == whole.num_heads + whole.num_kv_heads + kv_head + 1
            )
    assert sorted(seen) == list(range(whole.num_heads))


def test_heads_of_known_models():
    def kept(heads: int, kv_heads: int) -> list[tuple[int, int]]:
        cut = [Shards(config(heads, kv_heads), tp_size) for tp_size in (1, 2, 4, 8)]
        return [(shards.kv_heads, shards.queries) for shards in cut]

    assert kept(9, 3) == [(3, 3), (2, 3), (1, 3), (1, 2)]  # SmolLM2
    assert kept(4, 1) == [(1, 4), (1, 2), (1, 1), (1, 1)]  # Gemma 3 270M
    assert kept(32, 8) == [(8, 4), (4, 4), (2, 4), (1, 4)]  # Llama 3 8B


def test_a_tp_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="tp_size must be at least 1"):
        Shards(config(4, 1), 0)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("heads", [(9, 3), (4, 1)])
def test_a_part_is_read_as_it_is_cut(tmp_path, heads, dtype):
    """From safetensors, where only the part is read, and from a source that is read whole."""
    random = open_random(dataclasses.replace(config(*heads), qk_norm=False, o_bias=False), "random")
    whole = dataclasses.replace(random.config, mlp_bias=False, family="qwen2")
    params = {
        name: array.astype(dtype) for name, array in random.weights() if name in param_shapes(whole)
    }
    save_hf(tmp_path, whole, params)
    stored = open_hf(tmp_path)
    assert stored.config == whole
    for tp_size in (1, 2, 8):
        shards, own = Shards(whole, tp_size), Shards(random.config, tp_size)
        for device in range(tp_size):
            for name, array in params.items():
                wanted = shards.shard_param(name, array, device)
                found = stored.read_shard(name, shards, device)
                assert found.shape == wanted.shape
                np.testing.assert_array_equal(found, wanted)
            name = "layers.0.qkv"
            np.testing.assert_array_equal(
                random.read_shard(name, own, device),
                own.shard_param(name, dict(random.weights())[name], device),
            )
