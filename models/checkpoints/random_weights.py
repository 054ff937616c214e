"""Random weights for a config, for dry runs and compile checks without a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import Shape, TensorPart, param_shapes
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer

_SCALE = 0.02


class RandomTensors:
    """Canonical parameters: norms are one, others are normal with standard deviation 0.02.

    A tensor depends only on the seed and its name, not on other tensors or the order of reads.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._shapes = param_shapes(config)
        self._seed = seed

    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        if name.endswith("_norm"):
            return np.ones(shape, np.float32)
        random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        return random.standard_normal(shape, np.float32) * np.float32(_SCALE)


def open_random(config: ModelConfig, origin: str, seed: int = 0) -> Checkpoint:
    """A checkpoint of random weights with the byte tokenizer."""
    shapes = param_shapes(config)
    return Checkpoint(
        config=config,
        origin=origin,
        source=RandomTensors(config, seed),
        mapped={name: (TensorPart(name, shape[0]),) for name, shape in shapes.items()},
        build_tokenizer=lambda: byte_tokenizer(config.vocab_size),
    )
