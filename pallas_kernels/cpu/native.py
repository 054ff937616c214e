"""C++ kernels for the host CPU's vector units: matrix products and paged attention.

XLA:CPU repacks bfloat16 weights in every product, and its attention gathers pages before it
multiplies them. These kernels read both in place. They are called through XLA's foreign function
interface (FFI) and run on XLA's threads. The sources are in this folder. The first process that
needs the kernels compiles them with the machine's C++ compiler, which takes some seconds
(`library.py`).

The kernels need AVX-512 with its bfloat16 and int8 products: AMD Zen 4, Intel Sapphire Rapids, and
later. If these features or a compiler are missing, or `MUXJAX_NATIVE=off` is set,
`unavailable_reason` returns the reason, and XLA computes products and attention.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from muxjax.pallas_kernels.cpu import library
from muxjax.pallas_kernels.metadata import AttentionMetadata, AttentionOptions, AttentionRequest
from muxjax.pallas_kernels.target import current_target

log = logging.getLogger("muxjax")

PANEL = 32
"""Outputs in a panel of a matrix."""
KV_DTYPES = ("float32", "bfloat16")
"""Types of a pool that attention supports."""
_lock = threading.Lock()


def is_enabled() -> bool:
    """Whether the function being traced may call the kernels.

    True if it is traced for the host's CPU and the kernels are available. The first call may
    compile them.
    """
    return current_target().platform == "cpu" and unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why the kernels are unavailable on this machine, or None. The first call may compile them."""
    with _lock:
        return _load()


@cache
def _load() -> str | None:
    if os.environ.get("MUXJAX_NATIVE", "").lower() in ("off", "0", "no"):
        return "MUXJAX_NATIVE is off"
    if missing := _missing_features():
        return f"this processor lacks {', '.join(missing)}"
    compiler = library.find_compiler()
    if compiler is None:
        return f"no C++ compiler found (tried {', '.join(library.COMPILERS)})"
    try:
        loaded = library.load_library(compiler)
    except (library.KernelsNotCompiled, OSError) as error:
        log.warning("XLA computes products and attention, without the CPU kernels: %s", error)
        return str(error)
    for symbol in library.SYMBOLS:
        handler = jax.ffi.pycapsule(getattr(loaded, symbol))
        jax.ffi.register_ffi_target(symbol, handler, platform="cpu")
    return None


def _missing_features() -> list[str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["x86-64"]
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return ["a readable /proc/cpuinfo"]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [feature for feature in library.FEATURES if feature not in flags]


# Products


def panel_shape(shape: tuple[int, ...], dtype: jnp.dtype) -> tuple[int, ...] | None:
    """The shape of a matrix `[O, I]` in panels: `[O / 32, I / p, 32, p]`, `p` elements per 32 bits.

    None for other arrays, and for a matrix whose sizes are not divisible by 32 and `p`.
    """
    packed = 4 // jnp.dtype(dtype).itemsize
    if len(shape) != 2 or shape[0] % PANEL or shape[1] % packed:
        return None
    return (shape[0] // PANEL, shape[1] // packed, PANEL, packed)


def product(
    x: Float[Array, "T I"], weight: Float[Array, "panels units 32 packed"]
) -> Float[Array, "T O"]:
    """`x @ W.T` for a matrix in panels; `x` is rounded to the matrix's type, sums are float32."""
    kind = {"float32": "f32", "bfloat16": "bf16"}[weight.dtype.name]
    call = jax.ffi.ffi_call(f"muxjax_product_{kind}", _product_type(x, weight))
    result: Array = call(x.astype(jnp.float32), weight)
    return result


def product_int8(
    x: Float[Array, "T I"],
    weight: Int8[Array, "panels units 32 4"],
    scales: Float[Array, " O"],
    block: int,
) -> Float[Array, "T O"]:
    """`x @ W.T` in float32, where `weight` and `scales` are `int8.quantize(W)`, in panels.

    A Hadamard matrix rotates `x` in blocks of `block` inputs; then each row is rounded.
    """
    call = jax.ffi.ffi_call("muxjax_product_int8", _product_type(x, weight))
    result: Array = call(x.astype(jnp.float32), weight, scales, block=np.int64(block))
    return result


def _product_type(x: Array, weight: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], weight.shape[0] * PANEL), jnp.float32)


# Operations between products


def rms_norm(
    x: Float[Array, "*s C"], weight: Float[Array, " C"], eps: float
) -> Float[Array, "*s C"]:
    """Root-mean-square norm over the last axis, in one kernel; XLA:CPU compiles it to several."""
    call = jax.ffi.ffi_call("muxjax_rms_norm", jax.ShapeDtypeStruct(x.shape, jnp.float32))
    result: Array = call(x.astype(jnp.float32), weight, eps=np.float32(eps))
    return result


def rotated_heads(
    qkv: Float[Array, "T width"],
    angles: tuple[Float[Array, "T 1 half_H"], Float[Array, "T 1 half_H"]],
    norms: tuple[Float[Array, " H"], Float[Array, " H"]] | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"]]:
    """Splits queries and keys from `qkv`, normalizes each head, and applies the rotary embedding.

    Args:
      qkv: queries, keys and values of each token.
      angles: cosines and sines of each token's angles.
      norms: RMSNorm weights of queries and of keys; None for no norm.
      num_heads: `N`.
      num_kv_heads: `K`.
      eps: added to the mean square in the norms.
    """
    num_tokens, head_dim = qkv.shape[0], 2 * angles[0].shape[-1]
    shapes = tuple(
        jax.ShapeDtypeStruct((num_tokens, heads, head_dim), jnp.float32)
        for heads in (num_heads, num_kv_heads)
    )
    no_norm = jnp.zeros(0, jnp.float32)
    call = jax.ffi.ffi_call("muxjax_heads", shapes)
    q, k = call(qkv, *angles, *(norms or (no_norm, no_norm)), eps=np.float32(eps))
    return q, k


# Attention


def prefers_bfloat16_pool() -> bool:
    """Whether a bfloat16 pool is faster than a float32 one on the host's CPU.

    True if the kernels are available (XLA would widen the pool first) and XLA:CPU writes to it in
    place (before JAX 0.12, its scatter copies a bfloat16 pool). The first call may compile the
    kernels.
    """
    return unavailable_reason() is None and jax.__version_info__ >= (0, 12)


def unsupported_reason(request: AttentionRequest) -> str | None:
    """Why the kernel does not support a request, or None."""
    if request.kv_dtype.name not in KV_DTYPES:
        return f"needs a pool of {' or '.join(KV_DTYPES)}, not {request.kv_dtype}"
    if request.target.platform != "cpu":
        return f"runs on the host's CPU only, not on {request.target}"
    return unavailable_reason()


def paged_attention_native(
    q: Float[Array, "T N H"],
    kv: Float[Array, "P rows 128"],
    metadata: AttentionMetadata,
    options: AttentionOptions,
    layer: Int[Array, ""] | int,
) -> Float[Array, "T N H"]:
    """See `paged_attention`; the kernel computes decode as prefill with one query per sequence."""
    layout = metadata.layout
    arrays = (metadata.block_tables, metadata.kv_lens, metadata.query_starts)
    int32 = [jnp.asarray(array, jnp.int32) for array in arrays]
    call = jax.ffi.ffi_call("muxjax_paged_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32))
    out: Array = call(
        q.astype(jnp.float32),
        kv,
        *int32,
        jnp.asarray(layer, jnp.int32).reshape(1),
        kv_heads=np.int64(layout.num_kv_heads),
        padded=np.int64(layout.padded_head_dim),
        rows_per_token=np.int64(layout.rows_per_token),
        scale=np.float32(options.scale),
        softcap=np.float32(options.softcap or 0.0),
        window=np.int64(options.window or 0),
    )
    return out.astype(q.dtype)
