"""Kernels for this machine's own vector units, in C++: matrix products and paged attention.

XLA:CPU packs bfloat16 weights anew in each product, and its attention gathers pages before it
multiplies them; these read both where they lie. They are called through XLA's foreign function
interface and work on XLA's own threads. `cpu/` has the sources; the first process that wants them
compiles them with the machine's C++ compiler (some seconds) and keeps the library in the cache
folder, under a name made of all that went into it.

They need AVX-512 with its bfloat16 and int8 products: AMD Zen 4, Intel Sapphire Rapids, and later.
Where that or a compiler is missing, or `MUXJAX_NATIVE=off` is set, `unavailable_reason` says so,
and products and attention are XLA's.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from muxjax.cache import cache_folder
from muxjax.pallas_kernels.layout import KVLayout
from muxjax.pallas_kernels.metadata import AttentionRequest
from muxjax.pallas_kernels.target import current_target

log = logging.getLogger("muxjax")

PANEL = 32
"""Outputs of a matrix that lie together."""
KV_DTYPES = ("float32", "bfloat16")
"""Of a pool that attention reads."""
_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni", "fma")
"""As Linux calls what the kernels need."""
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w")
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 300.0
_HANDLERS = (
    "product_f32",
    "product_bf16",
    "product_int8",
    "rms_norm",
    "heads",
    "paged_attention",
)
_SOURCES = Path(__file__).parent
_lock = threading.Lock()


def is_enabled() -> bool:
    """Whether what is traced now may call the kernels: it is for this machine's CPU, and they are
    there. The first call may compile them.
    """
    return current_target().platform == "cpu" and unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why there are no kernels here, or None. The first call may compile them."""
    with _lock:
        return _load()


@cache
def _load() -> str | None:
    if os.environ.get("MUXJAX_NATIVE", "").lower() in ("off", "0", "no"):
        return "MUXJAX_NATIVE is off"
    if missing := _missing_features():
        return f"this processor lacks {', '.join(missing)}"
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return f"there is no C++ compiler ({', '.join(_COMPILERS)})"
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        found = getattr(error, "stderr", None) or str(error)
        log.warning("the CPU's own kernels could not be made with %s: %s", compiler, found)
        lines = found.strip().splitlines() or ["it did not say why"]
        why = next((line for line in lines if "error" in line), lines[0])
        return f"{compiler} could not make them: {why}"
    for name in _HANDLERS:
        handler = jax.ffi.pycapsule(getattr(library, f"muxjax_{name}"))
        jax.ffi.register_ffi_target(f"muxjax_{name}", handler, platform="cpu")
    return None


def _missing_features() -> list[str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["x86-64"]
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return ["/proc/cpuinfo, which says what it has"]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [feature for feature in _FEATURES if feature not in flags]


def _built(compiler: str) -> Path:
    """The library, compiled unless that was done before.

    Raises:
      OSError, subprocess.SubprocessError: it cannot be compiled or written.
    """
    include = jax.ffi.include_dir()
    features = [f"-m{feature.replace('_', '')}" for feature in _FEATURES]
    sources = sorted(_SOURCES.glob("*.cc"))
    command = [compiler, *_FLAGS, *features, f"-I{include}", *map(str, sources)]
    said = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    # Not the folder of the headers: environments with the same jaxlib share the library.
    parts = [said, version("jaxlib"), *_FLAGS, *features]
    parts += [path.read_text("utf-8") for path in sorted(_SOURCES.glob("*.[ch]*"))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = cache_folder() / "native" / f"kernels-{digest}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    # Under its own name only when it is whole: another process may look for it meanwhile.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, library.name)
        subprocess.run(
            [*command, "-o", str(made)],
            capture_output=True,
            text=True,
            check=True,
            timeout=_TIMEOUT_S,
        )
        made.replace(library)
    log.info("compiled the CPU's own kernels in %.1f s", time.perf_counter() - began)
    return library


# Products


def panel_shape(shape: tuple[int, ...], dtype: jnp.dtype) -> tuple[int, ...] | None:
    """The shape `[O / 32, I / p, 32, p]` in which a product takes a matrix `[O, I]`, where `p`
    numbers fill 32 bits; None for a matrix that does not divide so.
    """
    packed = 4 // jnp.dtype(dtype).itemsize
    if len(shape) != 2 or shape[0] % PANEL or shape[1] % packed:
        return None
    return (shape[0] // PANEL, shape[1] // packed, PANEL, packed)


def product(
    x: Float[Array, "T I"], weight: Float[Array, "panels units 32 packed"]
) -> Float[Array, "T O"]:
    """`x @ W.T` for a matrix in `panel_shape`; x is rounded to its type, sums are float32."""
    kind = {"float32": "f32", "bfloat16": "bf16"}[weight.dtype.name]
    call = jax.ffi.ffi_call(f"muxjax_product_{kind}", _result(x, weight))
    result: Array = call(x.astype(jnp.float32), weight)
    return result


def product_int8(
    x: Float[Array, "T I"],
    weight: Int8[Array, "panels units 32 4"],
    scales: Float[Array, " O"],
    block: int,
) -> Float[Array, "T O"]:
    """`x @ W.T` where `weight`, in `panel_shape`, and `scales` are W turned and rounded (`int8`);
    x is turned in blocks of so many and rounded by rows.
    """
    call = jax.ffi.ffi_call("muxjax_product_int8", _result(x, weight))
    result: Array = call(x.astype(jnp.float32), weight, scales, block=np.int64(block))
    return result


def _result(x: Array, weight: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], weight.shape[0] * PANEL), jnp.float32)


# Between products


def rms_norm(
    x: Float[Array, "*s C"], weight: Float[Array, " C"], eps: float
) -> Float[Array, "*s C"]:
    """Root-mean-square norm over the last axis, which XLA:CPU makes four programs of."""
    call = jax.ffi.ffi_call("muxjax_rms_norm", jax.ShapeDtypeStruct(x.shape, jnp.float32))
    result: Array = call(x.astype(jnp.float32), weight, eps=np.float32(eps))
    return result


def rotated_heads(
    qkv: Float[Array, "T width"],
    by: tuple[Float[Array, "T 1 half_H"], Float[Array, "T 1 half_H"]],
    norms: tuple[Float[Array, " H"], Float[Array, " H"]] | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"]]:
    """Queries and keys of `qkv` (queries, keys, values), normed head by head with `norms` of each,
    if there are such, and rotated by cosines and sines.
    """
    num_tokens, head_dim = qkv.shape[0], 2 * by[0].shape[-1]
    shapes = tuple(
        jax.ShapeDtypeStruct((num_tokens, heads, head_dim), jnp.float32)
        for heads in (num_heads, num_kv_heads)
    )
    none = jnp.zeros(0, jnp.float32)
    call = jax.ffi.ffi_call("muxjax_heads", shapes)
    q, k = call(qkv, *by, *(norms or (none, none)), eps=np.float32(eps))
    return q, k


# Attention


def reads_half_pools() -> bool:
    """Whether a pool of bfloat16 is faster than one of float32 on this machine's CPU: the kernel
    reads it, where XLA would widen it first, and JAX writes to it in place (before 0.12, XLA:CPU
    copies all of it). The first call may compile the kernels.
    """
    return unavailable_reason() is None and jax.__version_info__ >= (0, 12)


def unsupported_reason(request: AttentionRequest) -> str | None:
    """Why the kernel cannot carry out a request, or None."""
    if request.kv_dtype.name not in KV_DTYPES:
        return f"the pool must be of {' or '.join(KV_DTYPES)}, not {request.kv_dtype}"
    if request.target.platform != "cpu":
        return f"it runs on this machine's CPU, not on a {request.target}"
    return unavailable_reason()


def paged_attention_native(
    q: Float[Array, "T N H"],
    kv: Float[Array, "P rows 128"],
    block_tables: Int[Array, "S B"],
    kv_lens: Int[Array, " S"],
    query_starts: Int[Array, " S+1"],
    layer: Int[Array, ""] | int,
    *,
    layout: KVLayout,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    decode: bool = False,
) -> Float[Array, "T N H"]:
    """See `paged_attention`; decode is prefill with one query a sequence."""
    del decode
    int32 = [a.astype(jnp.int32) for a in (block_tables, kv_lens, query_starts)]
    call = jax.ffi.ffi_call("muxjax_paged_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32))
    out: Array = call(
        q.astype(jnp.float32),
        kv,
        *int32,
        jnp.asarray(layer, jnp.int32).reshape(1),
        kv_heads=np.int64(layout.num_kv_heads),
        padded=np.int64(layout.padded_head_dim),
        rows_per_token=np.int64(layout.rows_per_token),
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0.0),
        window=np.int64(window or 0),
    )
    return out.astype(q.dtype)
