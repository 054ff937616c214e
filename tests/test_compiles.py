"""The counter of compilations."""

import jax
import jax.numpy as jnp

from tests.compiles import counted_compiles


def test_only_compilations_in_the_block_are_counted():
    x = jnp.arange(3)
    jitted = jax.jit(lambda x: x * 3 + 1)
    ahead = jax.jit(lambda x: x * 5 + 1).lower(x)
    with counted_compiles() as compiled:
        assert compiled == []
        jitted(x)
        assert len(compiled) == 1
        ahead.compile()
        assert len(compiled) == 2
        jitted(x)
    jax.jit(lambda x: x * 7 + 1)(x)
    assert len(compiled) == 2
