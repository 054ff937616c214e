"""The entry point of paged attention, and the ordered list of its implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from muxjax.pallas_kernels.cpu import native
from muxjax.pallas_kernels.cpu.native import paged_attention_native
from muxjax.pallas_kernels.gpu import paged_attention as mosaic_gpu
from muxjax.pallas_kernels.gpu.paged_attention import paged_attention_mosaic_gpu
from muxjax.pallas_kernels.metadata import AttentionMetadata, AttentionOptions, AttentionRequest
from muxjax.pallas_kernels.reference import paged_attention_reference
from muxjax.pallas_kernels.target import current_target
from muxjax.pallas_kernels.tpu import paged_attention as mosaic_tpu
from muxjax.pallas_kernels.tpu.paged_attention import paged_attention_mosaic_tpu
from muxjax.pallas_kernels.xla import paged_attention_xla


@dataclass(frozen=True)
class Implementation:
    """An implementation of paged attention.

    Attributes:
      name: selects it in `paged_attention(implementation=...)`.
      platforms: platforms on which it can be selected by default.
      run: the function, with the positional arguments of `paged_attention`.
      unsupported_reason: returns why it does not support a request, or None if it does.
    """

    name: str
    platforms: tuple[str, ...]
    run: Callable[..., Array]
    unsupported_reason: Callable[[AttentionRequest], str | None] = lambda request: None

    def skip_reason(self, request: AttentionRequest) -> str | None:
        """Why the implementation is not selected by default for a request, or None."""
        platform = request.target.platform
        if platform not in self.platforms:
            platforms = " and ".join(self.platforms) or "tests"
            return f"{self.name}: for {platforms}, not {platform}"
        reason = self.unsupported_reason(request)
        return None if reason is None else f"{self.name}: {reason}"


def _reference_callback(
    q: Float[Array, "T N H"],
    kv: Float[Array, "P rows 128"],
    metadata: AttentionMetadata,
    options: AttentionOptions,
    layer: Int[Array, ""] | int,
) -> Float[Array, "T N H"]:
    """Runs the NumPy reference in a callback to the host."""

    def on_host(*args: Any) -> np.ndarray:
        q, kv, metadata, layer = jax.tree.map(np.asarray, args)
        out = paged_attention_reference(q, kv, metadata, options, int(layer))
        return out.astype(q.dtype)

    result = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return jax.pure_callback(on_host, result, q, kv, metadata, jnp.asarray(layer))


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(
        "mosaic_tpu", ("tpu",), paged_attention_mosaic_tpu, mosaic_tpu.unsupported_reason
    ),
    Implementation(
        "mosaic_gpu", ("gpu",), paged_attention_mosaic_gpu, mosaic_gpu.unsupported_reason
    ),
    Implementation("native", ("cpu",), paged_attention_native, native.unsupported_reason),
    Implementation("xla", ("cpu", "gpu", "tpu"), paged_attention_xla),
    Implementation("reference", (), _reference_callback),
)
"""In order of preference: the first that supports the request is selected."""


def choose_implementation(implementation: str | None, request: AttentionRequest) -> Implementation:
    """Selects the named implementation, or by default the first that supports the request.

    Raises:
      ValueError: the name is unknown, the named implementation does not support the request, or no
        implementation does. The message gives the reasons.
    """
    if implementation is not None:
        for candidate in IMPLEMENTATIONS:
            if candidate.name == implementation:
                if reason := candidate.unsupported_reason(request):
                    raise ValueError(f"paged attention by {candidate.name}: {reason}")
                return candidate
        names = ", ".join(candidate.name for candidate in IMPLEMENTATIONS)
        raise ValueError(
            f"unknown implementation of paged attention {implementation!r}; known: {names}"
        )
    skipped = []
    for candidate in IMPLEMENTATIONS:
        reason = candidate.skip_reason(request)
        if reason is None:
            return candidate
        skipped.append(reason)
    raise ValueError(f"no paged attention for {request.target}: " + "; ".join(skipped))


def paged_attention(
    q: Float[Array, "T N H"],
    kv: Float[Array, "P rows 128"],
    metadata: AttentionMetadata,
    options: AttentionOptions,
    layer: Int[Array, ""] | int,
    *,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Causal attention of ragged queries over contexts stored in the pool's pages.

    A query attends to its sequence's positions up to and including its position (see
    `AttentionMetadata`).

    Args:
      q: queries of all sequences, packed, after the rotary embedding. Padding gives zeros.
      kv: the pool; not donated (`write_kv` writes it).
      metadata: the sequences of the step.
      options: scale, window and soft cap of the layer.
      layer: index of the layer whose pages are read; may be traced.
      implementation: a name from `IMPLEMENTATIONS`; by default the first that supports the request
        on the target device. On other devices, a Pallas kernel needs Pallas's interpreter
        (`pltpu.force_tpu_interpret_mode`).

    Returns:
      Attention outputs in `q`'s type; softmax and sums are computed in float32.

    Raises:
      ValueError: the shapes do not match, or no implementation supports the request.
    """
    metadata.validate(q, kv)
    request = AttentionRequest(
        current_target(), metadata.layout, q.shape[1], q.dtype, kv.dtype, metadata.decode
    )
    chosen = choose_implementation(implementation, request)
    return chosen.run(q, kv, metadata, options, layer)
