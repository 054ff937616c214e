"""Random fleets and clusters."""

from __future__ import annotations

import random

from muxjax.placement.costs.cluster import Cluster, parse_cluster
from muxjax.placement.costs.model_shape import LLAMA_SHAPES, ModelShape
from muxjax.placement.planner.load import ModelLoad
from muxjax.scheduling.expected_load import ExpectedLoad

SHAPES: dict[str, ModelShape] = {
    **LLAMA_SHAPES,
    "llama3-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, small_params=65 * 4096),
    "llama3-70b": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, small_params=161 * 8192),
    "llama3-1b": ModelShape(16, 2048, 8192, 32, 8, 64, 128256, True, small_params=33 * 2048),
    "mha-3b": ModelShape(32, 2560, 6912, 32, 32, 80, 50304, small_params=65 * 2560),
}
"""Models of several sizes, with and without grouped queries and tied embeddings."""

TINY_CLUSTERS = ("1x1", "1x2", "1x4", "2x1", "2x2", "3x1", "4x1", "1x3")


def tiny_fleet(seed: int) -> tuple[list[ModelLoad], Cluster]:
    """Up to five models and four devices, from low load to heavy overload."""
    rand = random.Random(seed)
    text = f"{rand.choice(TINY_CLUSTERS)}:{rand.choice(('a100-80gb', 'h100', 'h200'))}"
    cluster = parse_cluster(text)
    level = 10 ** rand.uniform(0, 2.5)
    loads = [
        ModelLoad(
            name=f"m{index}",
            kind=rand.choice(list(SHAPES)),
            expected=ExpectedLoad(
                rate=level * 10 ** rand.uniform(-1, 0.5),
                prompt_tokens=rand.choice((50.0, 161.0, 600.0)),
                output_tokens=rand.choice((20.0, 150.0, 338.0)),
            ),
        )
        for index in range(rand.randint(1, 5))
    ]
    return loads, cluster


def large_fleet(nodes: int, models: int, seed: int = 0) -> tuple[list[ModelLoad], Cluster]:
    """Models with power-law rates that add up to about the capacity of nodes of 8 H100s."""
    rand = random.Random(seed)
    rates = [rand.paretovariate(1.1) for _ in range(models)]
    scale = 12 * nodes * 8 / sum(rates)
    kinds = list(SHAPES)
    loads = [
        ModelLoad(f"m{index}", rand.choice(kinds), ExpectedLoad(rate * scale))
        for index, rate in enumerate(rates)
    ]
    return loads, parse_cluster(f"{nodes}x8:h100")
