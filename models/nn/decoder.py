"""One decoder for every family: what differs between them is in `ModelConfig`.

A pre-norm transformer with rotary embedding, grouped-query attention and a gated MLP (LLaMA,
Touvron et al. 2023), with what Mistral, Qwen and Gemma add as options. Arrays and an `Attend` go
in, arrays come out; nothing here knows of requests, pages or batching.

Activations between the products are float32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from muxjax.models.nn.attention import Attend, Cache, DenseAttend
from muxjax.models.nn.config import ModelConfig, RopeConfig, rope_frequencies
from muxjax.models.nn.int8 import linear_int8, rows_of_int8
from muxjax.models.nn.linear import linear, rows_of, stored_shape
from muxjax.models.nn.params import param_shapes
from muxjax.models.nn.stacks import Stacks
from muxjax.pallas_kernels.cpu import native
from muxjax.pallas_kernels.metadata import AttentionOptions

Weight = Array | np.ndarray | jax.ShapeDtypeStruct
"""A parameter; only its shape, where a decoder is made to be compiled."""
Rotation = tuple[Float[Array, "T 1 half_H"], Float[Array, "T 1 half_H"]]
"""Cosines and sines of each token's angles."""


def rms_norm(
    x: Float[Array, "*s C"], weight: Float[Array, " C"], eps: float
) -> Float[Array, "*s C"]:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotation(rope: RopeConfig, head_dim: int, positions: Int[Array, " T"]) -> Rotation:
    """The angles of each token, for `rotate`."""
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim))
    angles = positions[:, None, None].astype(jnp.float32) * frequencies  # T 1 H/2
    # Or XLA:CPU computes them anew in each layer: 2 to 3 % of a step.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate(x: Float[Array, "T heads H"], by: Rotation) -> Float[Array, "T heads H"]:
    """Rotary position embedding over pairs (i, i + H/2) (Su et al. 2021)."""
    cos, sin = by
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Layer(nnx.Module):
    """Attention and MLP, each around a residual sum.

    Holds the canonical parameters `layers.{l}.*` (see `params`) under their short names; those of
    one device where the model is cut, and `axis` is then what its two sums go over.
    """

    attn_norm: nnx.Param
    qkv: nnx.Param
    q_norm: nnx.Param
    k_norm: nnx.Param
    o: nnx.Param
    post_attn_norm: nnx.Param
    mlp_norm: nnx.Param
    gate_up: nnx.Param
    down: nnx.Param
    post_mlp_norm: nnx.Param

    def __init__(self, weights: Mapping[str, Weight], axis: str | None = None) -> None:
        self.axis = axis
        for name, value in weights.items():
            setattr(self, name, nnx.Param(value))

    def __call__(
        self,
        config: ModelConfig,
        sliding: bool,
        x: Float[Array, "T D"],
        cache: Cache,
        index: Int[Array, ""] | int,
        angles: Rotation,
        attend: Attend[Cache],
    ) -> tuple[Float[Array, "T D"], Cache]:
        # Matrices in panels are for the CPU's own kernels.
        on_own_kernels = self.qkv[...].ndim == 4
        norm = partial(native.rms_norm if on_own_kernels else rms_norm, eps=config.norm_eps)
        num_tokens, head_dim = x.shape[0], config.head_dim
        num_q, num_kv = config.num_heads, config.num_kv_heads

        h = norm(x, self.attn_norm[...])
        qkv = self._product("qkv", h)  # T (N+2K)*H
        heads = qkv.reshape(num_tokens, num_q + 2 * num_kv, head_dim)
        q, k, v = jnp.split(heads, [num_q, num_q + num_kv], axis=1)
        norms = (self.q_norm[...], self.k_norm[...]) if config.qk_norm else None
        if on_own_kernels:
            q, k = native.rotated_heads(
                qkv, angles, norms, num_heads=num_q, num_kv_heads=num_kv, eps=config.norm_eps
            )
        else:
            if norms is not None:
                q, k = norm(q, norms[0]), norm(k, norms[1])
            q, k = rotate(q, angles), rotate(k, angles)
        out, cache = attend(
            cache,
            index,
            q,
            k,
            v,
            AttentionOptions(
                config.attn_scale,
                config.sliding_window if sliding else None,
                config.attn_softcap,
            ),
        )
        out = self._product("o", out.reshape(num_tokens, num_q * head_dim), summed=True)
        if config.post_norms:
            out = norm(out, self.post_attn_norm[...])
        x = x + out

        h = norm(x, self.mlp_norm[...])
        # By far the largest activation: in float32 it is 117 MB for 1024 tokens of Llama 3 8B. The
        # product that follows rounds to the weights' type anyway.
        gate_up = self._product("gate_up", h, rounded=True)  # T 2F
        gate, up = jnp.split(gate_up, 2, axis=1)
        if config.activation == "silu":
            gate = jax.nn.silu(gate)
        else:
            gate = jax.nn.gelu(gate, approximate=True)
        out = self._product("down", gate * up, summed=True)
        if config.post_norms:
            out = norm(out, self.post_mlp_norm[...])
        return x + out, cache

    def _product(
        self, name: str, x: Float[Array, "T I"], *, rounded: bool = False, summed: bool = False
    ) -> Float[Array, "T O"]:
        """With the layer's matrix of that name; `summed` over the devices that have its columns."""
        weight, scales = getattr(self, name)[...], _optional(self, f"{name}_scales")
        bias = _optional(self, f"{name}_bias")
        if not summed or self.axis is None:
            return _product(x, weight, scales, bias, rounded=rounded)
        out = jax.lax.psum(_product(x, weight, scales), self.axis)
        return out if bias is None else out + bias


def _optional(module: nnx.Module, name: str) -> Array | None:
    return getattr(module, name)[...] if hasattr(module, name) else None


def _product(
    x: Float[Array, "T I"],
    weight: Array,
    scales: Float[Array, " O"] | None,
    bias: Float[Array, " O"] | None = None,
    *,
    rounded: bool = False,
) -> Float[Array, "T O"]:
    """With a matrix of any form; `scales` come with one of int8."""
    if scales is None:
        return linear(x, weight, bias, rounded=rounded)
    return linear_int8(x, weight, scales, bias, rounded=rounded)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    graph: Any,
    config: ModelConfig,
    sliding: bool,
    state: Any,
    *args: Any,
) -> tuple[Float[Array, "T D"], Any]:
    """A layer, as `nnx.split` gives it, as a function: layers of one kind are traced once.

    Tracing SmolLM2's 30 layers takes 0.2 s so, and 1.0 s one by one; what is compiled is the same.
    """
    return nnx.merge(graph, state)(config, sliding, *args)


class Decoder(nnx.Module):
    """A causal language model.

    Args:
      config: sizes and options.
      weights: every canonical parameter of `param_shapes(config)`, in those shapes or as
        `linear` keeps them, or int8 with its `NAME_scales` (`int8`, `kept`); or those of
        `stacks.shapes(config)`.
      stacks: which layers are stacked and run under `lax.scan`; by default none.
      vocab_size: of the whole model, where this is one device's part (`shards.Shards`): `config` is
        then that of the part.
      axis: the mesh axis that the model is cut over: what is called runs inside a `shard_map` that
        has it. None where the model is whole.

    Raises:
      ValueError: a parameter is missing, unknown or misshapen.
    """

    embed: nnx.Param
    final_norm: nnx.Param

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        stacks: Stacks | None = None,
        *,
        vocab_size: int | None = None,
        axis: str | None = None,
    ) -> None:
        shapes = param_shapes(config) if stacks is None else stacks.shapes(config)
        for name in [name for name in shapes if name in weights]:
            if weights[name].dtype == jnp.int8:
                shapes[f"{name}_scales"] = shapes[name][:-1]
        if unlike := set(shapes) ^ set(weights):
            raise ValueError(f"parameters missing or unknown: {', '.join(sorted(unlike)[:5])}")
        for name, shape in shapes.items():
            if tuple(weights[name].shape) not in (shape, stored_shape(shape, weights[name].dtype)):
                raise ValueError(f"{name} has shape {weights[name].shape}, wanted {shape}")
        self.config = config
        self.vocab_size = config.vocab_size if vocab_size is None else vocab_size
        self.axis = axis
        for name, value in weights.items():
            if "." not in name:  # embed, final_norm, head, and what scales they have
                setattr(self, name, nnx.Param(value))

        def layer(prefix: str) -> Layer:
            own = {n[len(prefix) :]: w for n, w in weights.items() if n.startswith(prefix)}
            return Layer(own, axis)

        # The first layers, by kind and stacked, then the others.
        self.repeats = 0 if stacks is None else stacks.repeats
        kinds = range(0 if stacks is None else stacks.period)
        self.stacks = nnx.List([layer(f"stacks.{kind}.") for kind in kinds])
        apart = range(len(kinds) * self.repeats, config.num_layers)
        self.layers = nnx.List([layer(f"layers.{index}.") for index in apart])

    @staticmethod
    def init(config: ModelConfig, rngs: nnx.Rngs) -> Decoder:
        """A decoder to be trained: normal weights of standard deviation 0.02, norms of one."""
        weights: dict[str, Weight] = {}
        for name, shape in param_shapes(config).items():
            if name.endswith("norm"):
                weights[name] = jnp.ones(shape)
            elif name.endswith("bias"):
                weights[name] = jnp.zeros(shape)
            else:
                weights[name] = 0.02 * jax.random.normal(rngs.params(), shape)
        return Decoder(config, weights)

    def weights(self) -> dict[str, np.ndarray]:
        """The canonical parameters, on the host; of a decoder without stacks.

        Raises:
          ValueError: they are quantised.
        """
        if hasattr(self, "embed_scales"):
            raise ValueError("a quantised decoder has no canonical parameters; load it unquantised")
        found = {}
        for name in param_shapes(self.config):
            owner: nnx.Module = self
            short = name
            if name.startswith("layers."):
                _, index, short = name.split(".")
                owner = self.layers[int(index)]
            found[name] = np.asarray(getattr(owner, short)[...])
        return found

    def __call__(
        self,
        tokens: Int[Array, " T"],
        positions: Int[Array, " T"],
        cache: Cache,
        attend: Attend[Cache],
    ) -> tuple[Float[Array, "T D"], Cache]:
        """The last hidden states, normed, and the cache with the step's keys and values in it."""
        config = self.config
        x = self._embedded(tokens) * config.embed_scale
        angles = rotation(config.rope, config.head_dim, positions)
        local = config.local_rope
        local_angles = angles if local is None else rotation(local, config.head_dim, positions)

        def run(
            graph: Any, state: Any, kind: int, index: Array | int, x: Array, cache: Any
        ) -> tuple[Array, Any]:
            sliding = config.layer_is_sliding[kind]
            by = local_angles if sliding else angles
            return _run(graph, config, sliding, state, x, cache, index, by, attend)

        period = len(self.stacks)
        if period:
            graphs, states = zip(*map(nnx.split, self.stacks), strict=True)

            def repeat(
                carry: tuple[Array, Any], step: tuple[Array, tuple[Any, ...]]
            ) -> tuple[tuple[Array, Any], None]:
                x, cache = carry
                index, states = step
                for kind, (graph, state) in enumerate(zip(graphs, states, strict=True)):
                    x, cache = run(graph, state, kind, index * period + kind, x, cache)
                return (x, cache), None

            at = jnp.arange(self.repeats, dtype=jnp.int32)
            (x, cache), _ = jax.lax.scan(repeat, (x, cache), (at, states))
        for index, layer in enumerate(self.layers, period * self.repeats):
            graph, state = nnx.split(layer)
            x, cache = run(graph, state, index, index, x, cache)
        return rms_norm(x, self.final_norm[...], config.norm_eps), cache

    def _embedded(self, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
        if self.axis is None:
            return self._rows(tokens)
        # Each device looks up the tokens of its rows, the others give zeros.
        here = tokens - jax.lax.axis_index(self.axis) * self.config.vocab_size
        own = (here >= 0) & (here < self.config.vocab_size)
        x = self._rows(jnp.where(own, here, 0))
        return jax.lax.psum(jnp.where(own[:, None], x, 0.0), self.axis)

    def _rows(self, rows: Int[Array, " T"]) -> Float[Array, "T D"]:
        scales = _optional(self, "embed_scales")
        if scales is None:
            return rows_of(self.embed[...], rows).astype(jnp.float32)
        return rows_of_int8(self.embed[...], scales, rows)

    def logits(self, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Logits of the next token, from hidden states as `__call__` returns them."""
        head = "embed" if self.config.tie_embeddings else "head"
        logits = _product(hidden, getattr(self, head)[...], _optional(self, f"{head}_scales"))
        if self.axis is not None:
            # Each device has the logits of its rows of the vocabulary; the last may have filling.
            logits = jax.lax.all_gather(logits, self.axis, axis=1, tiled=True)
            logits = logits[:, : self.vocab_size]
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def dense_logits(self, tokens: Int[Array, "B length"]) -> Float[Array, "B length V"]:
        """Logits of whole sequences, with no pool: for training and tests."""
        batch, length = tokens.shape
        positions = jnp.tile(jnp.arange(length), batch)
        hidden, _ = self(tokens.reshape(-1), positions, None, DenseAttend(length))
        return self.logits(hidden).reshape(batch, length, -1)
