"""What an implementation of paged attention is told before it accepts or refuses."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from muxjax.pallas_kernels.layout import KVLayout
from muxjax.pallas_kernels.target import KernelTarget


@dataclass(frozen=True)
class AttentionRequest:
    """What is asked of an implementation, known when it is traced.

    Attributes:
      target: the device that is traced for.
      layout: the model's geometry in the pool.
      num_heads: `N`, query heads.
      q_dtype, kv_dtype: of the queries and of the pool.
      decode: one query a sequence.
    """

    target: KernelTarget
    layout: KVLayout
    num_heads: int
    q_dtype: jnp.dtype
    kv_dtype: jnp.dtype
    decode: bool
