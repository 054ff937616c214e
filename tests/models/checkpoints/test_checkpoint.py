"""Reading whole parameters and shards from a source that records its reads."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.checkpoint import Checkpoint, Wait
from muxjax.models.checkpoints.hf import hf_mapping
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import Shape, param_shapes, stored_shapes
from muxjax.models.nn.shards import Shards


def config(family: str = "llama") -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=10,
        num_layers=1,
        hidden_size=8,
        intermediate_size=12,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        max_position=16,
        tie_embeddings=True,
        qk_norm=family == "gemma3",
        post_norms=family == "gemma3",
    )


class Slices:
    """A `SliceSource` of tensors in memory; `elements` counts the elements read."""

    def __init__(self, model: ModelConfig, dtype: str = "float32") -> None:
        rng = np.random.default_rng(0)
        self.tensors = {
            name: rng.standard_normal(shape).astype(dtype)
            for name, shape in stored_shapes(model, hf_mapping(model)).items()
        }
        self.elements = 0

    def shapes(self) -> Mapping[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.tensors[name].dtype

    def read_into(self, out: np.ndarray, name: str, axis: int, start: int) -> Wait:
        self.elements += out.size
        stored = self.tensors[name].take(range(start, start + out.shape[axis]), axis)
        return lambda: np.copyto(out, stored)


def open_slices(model: ModelConfig, source: Slices) -> Checkpoint:
    return Checkpoint(model, "memory", source, hf_mapping(model), lambda: None)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_read_shard_reads_only_the_shard(family: str, tp_size: int) -> None:
    model = config(family)
    source = Slices(model)
    checkpoint, shards = open_slices(model, source), Shards(model, tp_size)
    assert list(dict(checkpoint.weights())) == list(param_shapes(model))
    for name in param_shapes(model):
        param = checkpoint.read_param(name)
        for device in range(tp_size):
            source.elements = 0
            shard = checkpoint.read_shard(name, shards, device)
            np.testing.assert_array_equal(shard, shards.shard_param(name, param, device))
            assert source.elements <= shard.size


def test_tensors_must_match_the_config() -> None:
    model = config()
    source = Slices(model)
    source.tensors["extra"] = np.zeros(1, np.float32)
    with pytest.raises(CheckpointError, match=r"memory: tensors .* does not have: extra"):
        open_slices(model, source)
    del source.tensors["extra"], source.tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"memory: tensor model.norm.weight \[8\] is missing"):
        open_slices(model, source)
