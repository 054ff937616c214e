"""Runs the implementations of paged attention for tests."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.pallas_kernels import AttentionOptions, paged_attention
from tests.pallas_kernels.cases import AttentionCase
from tests.pallas_kernels.interpreting import interpreted


def run(
    case: AttentionCase, name: str, *, dtype=jnp.float32, decode=False, window=None, softcap=None
):
    """Returns the output of the named implementation, compiled or interpreted, in float32."""
    options = AttentionOptions(case.layout.head_dim**-0.5, window, softcap)
    metadata = replace(case.metadata, decode=decode)

    def attend(q, kv, metadata, layer):
        return paged_attention(q, kv, metadata, options, layer, implementation=name)

    q, kv = jnp.asarray(case.q, dtype), jnp.asarray(case.kv, dtype)
    with interpreted(name):
        out = jax.jit(attend)(q, kv, metadata, case.layer)
        return np.asarray(out, np.float32)
