"""One decoder for every model family; the families' differences are options in `ModelConfig`.

A pre-norm transformer with rotary embedding, grouped-query attention and a gated MLP (LLaMA,
Touvron et al. 2023), with the additions of Mistral, Qwen and Gemma as options. Inputs are arrays
and an `Attend`; outputs are arrays. The model is independent of requests, pages and batching.

Activations between products are float32 for every type of weights.
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
from muxjax.models.nn.int8 import linear_int8, lookup_rows_int8
from muxjax.models.nn.linear import linear, lookup_rows, stored_shape
from muxjax.models.nn.params import param_shapes
from muxjax.models.nn.stacks import Stacks
from muxjax.pallas_kernels.cpu import native
from muxjax.pallas_kernels.metadata import AttentionOptions

Weight = Array | np.ndarray | jax.ShapeDtypeStruct
"""A parameter, or only its shape and type for compiling without weights."""
Rotation = tuple[Float[Array, "T 1 half_H"], Float[Array, "T 1 half_H"]]
"""Cosines and sines of each token's angles."""


def rms_norm(
    x: Float[Array, "*s C"], weight: Float[Array, " C"], eps: float
) -> Float[Array, "*s C"]:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotation(rope: RopeConfig, head_dim: int, positions: Int[Array, " T"]) -> Rotation:
    """Cosines and sines of each token's angles, for `rotate`."""
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim))
    angles = positions[:, None, None].astype(jnp.float32) * frequencies  # T 1 H/2
    # Without the barrier, XLA:CPU recomputes the angles in each layer.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate(x: Float[Array, "T heads H"], angles: Rotation) -> Float[Array, "T heads H"]:
    """Rotary position embedding over pairs (i, i + H/2) (Su et al. 2021)."""
    cos, sin = angles
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Layer(nnx.Module):
    """Attention and MLP, each with a residual sum.

    Args:
      weights: the canonical parameters `layers.{l}.*` (see `params`), by their short names. For a
        sharded model, one device's shards.
      axis: the mesh axis over which a sharded model's two sums are reduced; None if it is not
        sharded.
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
        # Only the CPU kernels use matrices in panels.
        uses_cpu_kernels = self.qkv[...].ndim == 4
        norm = partial(native.rms_norm if uses_cpu_kernels else rms_norm, eps=config.norm_eps)
        num_tokens, head_dim = x.shape[0], config.head_dim
        num_q, num_kv = config.num_heads, config.num_kv_heads

        h = norm(x, self.attn_norm[...])
        qkv = self._product("qkv", h)  # T (N+2K)*H
        heads = qkv.reshape(num_tokens, num_q + 2 * num_kv, head_dim)
        q, k, v = jnp.split(heads, [num_q, num_q + num_kv], axis=1)
        norms = (self.q_norm[...], self.k_norm[...]) if config.qk_norm else None
        if uses_cpu_kernels:
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
        # The largest activation, so it is stored in the weights' type where that is faster. The
        # next product rounds to this type in any case.
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
        """Product with the layer's matrix `name`; `summed` adds the products of all devices."""
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
    """Product with a matrix in its stored shape; `scales` belong to int8 matrices."""
    if scales is None:
        return linear(x, weight, bias, rounded=rounded)
    return linear_int8(x, weight, scales, bias, rounded=rounded)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run_layer(
    graph: Any,
    config: ModelConfig,
    sliding: bool,
    state: Any,
    *args: Any,
) -> tuple[Float[Array, "T D"], Any]:
    """Runs a layer that `nnx.split` has split. Jitted so that a kind of layer is traced only once.

    The compiled program is the same as without `jit`.
    """
    return nnx.merge(graph, state)(config, sliding, *args)


class Decoder(nnx.Module):
    """A causal language model.

    Args:
      config: sizes and options.
      weights: every canonical parameter of `param_shapes(config)` or `stacks.shapes(config)`. Its
        shape is that one or its `linear.stored_shape`; int8 has `NAME_scales` too
        (`weight_format.stored_params`).
      stacks: the layers that are stacked and run under `lax.scan`; None for no stacks.
      vocab_size: the whole model's vocabulary, if `config` describes one device's shard
        (`shards.Shards.local`); by default `config.vocab_size`.
      axis: the mesh axis over which the model is sharded; calls must run inside a `shard_map` with
        this axis. None if the model is not sharded.

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
        if mismatched := set(shapes) ^ set(weights):
            raise ValueError(f"parameters missing or unknown: {', '.join(sorted(mismatched)[:5])}")
        for name, shape in shapes.items():
            if tuple(weights[name].shape) not in (shape, stored_shape(shape, weights[name].dtype)):
                raise ValueError(f"{name} has shape {weights[name].shape}, expected {shape}")
        self.config = config
        self.vocab_size = config.vocab_size if vocab_size is None else vocab_size
        self.axis = axis
        for name, value in weights.items():
            if "." not in name:  # embed, final_norm, head, and their scales
                setattr(self, name, nnx.Param(value))

        def layer(prefix: str) -> Layer:
            params = {n[len(prefix) :]: w for n, w in weights.items() if n.startswith(prefix)}
            return Layer(params, axis)

        # Stacked layers by kind, then separate ones.
        self.repeats = 0 if stacks is None else stacks.repeats
        kinds = range(0 if stacks is None else stacks.period)
        self.stacks = nnx.List([layer(f"stacks.{kind}.") for kind in kinds])
        separate = range(len(kinds) * self.repeats, config.num_layers)
        self.layers = nnx.List([layer(f"layers.{index}.") for index in separate])

    @staticmethod
    def init(config: ModelConfig, rngs: nnx.Rngs) -> Decoder:
        """A decoder for training: normal weights with standard deviation 0.02; norms are one."""
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
        """The canonical parameters of a decoder without stacks, on the host.

        Raises:
          ValueError: the weights are quantized.
        """
        if hasattr(self, "embed_scales"):
            raise ValueError("a quantized decoder has no canonical parameters; load it unquantized")
        params = {}
        for name in param_shapes(self.config):
            module: nnx.Module = self
            short = name
            if name.startswith("layers."):
                _, index, short = name.split(".")
                module = self.layers[int(index)]
            params[name] = np.asarray(getattr(module, short)[...])
        return params

    def __call__(
        self,
        tokens: Int[Array, " T"],
        positions: Int[Array, " T"],
        cache: Cache,
        attend: Attend[Cache],
    ) -> tuple[Float[Array, "T D"], Cache]:
        """The last hidden states after the final norm, and the updated cache.

        Args:
          tokens: token ids of all sequences, packed.
          positions: each token's position in its sequence.
          cache: passed to `attend` by each layer.
          attend: attention over the cache.
        """
        config = self.config
        x = self._embed(tokens) * config.embed_scale
        angles = rotation(config.rope, config.head_dim, positions)
        local = config.local_rope
        local_angles = angles if local is None else rotation(local, config.head_dim, positions)

        def run(
            graph: Any, state: Any, kind: int, index: Array | int, x: Array, cache: Any
        ) -> tuple[Array, Any]:
            sliding = config.layer_is_sliding[kind]
            rotated_by = local_angles if sliding else angles
            return _run_layer(graph, config, sliding, state, x, cache, index, rotated_by, attend)

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

            indices = jnp.arange(self.repeats, dtype=jnp.int32)
            (x, cache), _ = jax.lax.scan(repeat, (x, cache), (indices, states))
        for index, layer in enumerate(self.layers, period * self.repeats):
            graph, state = nnx.split(layer)
            x, cache = run(graph, state, index, index, x, cache)
        return rms_norm(x, self.final_norm[...], config.norm_eps), cache

    def _embed(self, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
        if self.axis is None:
            return self._rows(tokens)
        # Each device looks up the tokens in its rows of the vocabulary; other tokens are zeros.
        rows = tokens - jax.lax.axis_index(self.axis) * self.config.vocab_size
        is_local = (rows >= 0) & (rows < self.config.vocab_size)
        x = self._rows(jnp.where(is_local, rows, 0))
        return jax.lax.psum(jnp.where(is_local[:, None], x, 0.0), self.axis)

    def _rows(self, rows: Int[Array, " T"]) -> Float[Array, "T D"]:
        scales = _optional(self, "embed_scales")
        if scales is None:
            return lookup_rows(self.embed[...], rows).astype(jnp.float32)
        return lookup_rows_int8(self.embed[...], scales, rows)

    def logits(self, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Logits of the next token, from hidden states that `__call__` returned."""
        head = "embed" if self.config.tie_embeddings else "head"
        logits = _product(hidden, getattr(self, head)[...], _optional(self, f"{head}_scales"))
        if self.axis is not None:
            # Each device has the logits of its rows of the vocabulary; the last may be padding.
            logits = jax.lax.all_gather(logits, self.axis, axis=1, tiled=True)
            logits = logits[:, : self.vocab_size]
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def dense_logits(self, tokens: Int[Array, "B length"]) -> Float[Array, "B length V"]:
        """Logits of complete sequences, without a pool; for training and tests."""
        batch, length = tokens.shape
        positions = jnp.tile(jnp.arange(length), batch)
        hidden, _ = self(tokens.reshape(-1), positions, None, DenseAttend(length))
        return self.logits(hidden).reshape(batch, length, -1)
