"""The one entry to paged attention, and the ordered list of what may carry it out."""

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
from muxjax.pallas_kernels.layout import LANES, KVLayout
from muxjax.pallas_kernels.metadata import AttentionRequest
from muxjax.pallas_kernels.reference import paged_attention_reference
from muxjax.pallas_kernels.target import current_target
from muxjax.pallas_kernels.tpu import paged_attention as mosaic_tpu
from muxjax.pallas_kernels.tpu.paged_attention import paged_attention_mosaic_tpu
from muxjax.pallas_kernels.xla import paged_attention_xla


@dataclass(frozen=True)
class Implementation:
    """One way to compute paged attention.

    Attributes:
      name: what `paged_attention(implementation=...)` calls it.
      platforms: where it is taken by itself; elsewhere it must be asked for by name.
      run: the function, with the arguments of `paged_attention`.
      unable: why it cannot carry out a request on any of its platforms, or None if it can.
    """

    name: str
    platforms: tuple[str, ...]
    run: Callable[..., Array]
    unable: Callable[[AttentionRequest], str | None] = lambda request: None

    def refusal(self, request: AttentionRequest) -> str | None:
        """Why it is not taken by itself for a request, or None."""
        platform = request.target.platform
        if platform not in self.platforms:
            made_for = " and ".join(self.platforms) or "tests"
            return f"{self.name}: made for {made_for}, not {platform}"
        reason = self.unable(request)
        return None if reason is None else f"{self.name}: {reason}"


def _reference(
    q: Array,
    kv: Array,
    block_tables: Array,
    kv_lens: Array,
    query_starts: Array,
    layer: Array | int,
    *,
    layout: KVLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
    decode: bool,
) -> Array:
    """The numpy reference, called back to the host."""
    del decode

    def host(*args: Any) -> Any:
        *arrays, layer = [np.asarray(a) for a in args]
        q, kv, block_tables, kv_lens, query_starts = arrays
        out = paged_attention_reference(
            q,
            kv,
            block_tables,
            kv_lens,
            query_starts,
            int(layer),
            layout=layout,
            scale=scale,
            window=window,
            softcap=softcap,
        )
        return out.astype(q.dtype)

    return jax.pure_callback(
        host,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        q,
        kv,
        block_tables,
        kv_lens,
        query_starts,
        jnp.asarray(layer),
    )


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(
        "mosaic_tpu", ("tpu",), paged_attention_mosaic_tpu, mosaic_tpu.unsupported_reason
    ),
    Implementation(
        "mosaic_gpu", ("gpu",), paged_attention_mosaic_gpu, mosaic_gpu.unsupported_reason
    ),
    Implementation("native", ("cpu",), paged_attention_native, native.unsupported_reason),
    Implementation("xla", ("cpu", "gpu", "tpu"), paged_attention_xla),
    Implementation("reference", (), _reference),
)
"""In order of preference. The first that does not refuse the request is taken."""


def choose_implementation(implementation: str | None, request: AttentionRequest) -> Implementation:
    """The named implementation, or the first that does not refuse the request.

    Raises:
      ValueError: an unknown name, or one that is unable to do this; or, with no name, nothing that
        takes the request. Says why each refused.
    """
    if implementation is not None:
        for candidate in IMPLEMENTATIONS:
            if candidate.name == implementation:
                if reason := candidate.unable(request):
                    raise ValueError(f"paged attention by {candidate.name}: {reason}")
                return candidate
        names = ", ".join(c.name for c in IMPLEMENTATIONS)
        raise ValueError(f"no paged attention called {implementation!r}; there are: {names}")
    refusals = []
    for candidate in IMPLEMENTATIONS:
        refusal = candidate.refusal(request)
        if refusal is None:
            return candidate
        refusals.append(refusal)
    raise ValueError(f"no paged attention for {request.target}: " + "; ".join(refusals))


def paged_attention(
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
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Causal attention of ragged queries over contexts kept in the pool's pages.

    The queries of sequence `s` are `q[query_starts[s] : query_starts[s + 1]]`. They are the last
    tokens of its context, whose keys and values are in the pool already: of `n` queries the `i`-th
    stands at position `kv_lens[s] - n + i` and sees the positions up to its own.

    Args:
      q: queries of all sequences, packed; rotated already.
      kv: the pool, not donated here (`write_kv` is what writes it).
      block_tables: first page of each block of each sequence; layer `l` reads page `first + l`.
        Entries past a sequence's length may be any page that exists.
      kv_lens: tokens in each context, the queries included; 0 for an empty row.
      query_starts: cumulative counts of queries. `q` past the last is padding: it gives zeros.
      layer: which layer's pages to read; may be traced.
      layout: the model's geometry in the pool.
      scale: multiplies the scores.
      window: a query sees this many positions at most, its own included.
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
      decode: one query a sequence: `T == S` and row `s` is sequence `s`'s query.
      implementation: a name from `IMPLEMENTATIONS`; by default the first that takes the request
        on the device that is traced for. A Pallas kernel named where it cannot be compiled runs
        only inside Pallas's interpreter (`pltpu.force_tpu_interpret_mode`).

    Returns:
      Attention outputs in `q`'s type; softmax and sums are in float32.

    Raises:
      ValueError: shapes that do not fit each other, or no implementation.
    """
    _validate(q, kv, block_tables, kv_lens, query_starts, layout, window, decode)
    request = AttentionRequest(current_target(), layout, q.shape[1], q.dtype, kv.dtype, decode)
    chosen = choose_implementation(implementation, request)
    return chosen.run(
        q,
        kv,
        block_tables,
        kv_lens,
        query_starts,
        layer,
        layout=layout,
        scale=scale,
        window=window,
        softcap=softcap,
        decode=decode,
    )


def _validate(
    q: Array,
    kv: Array,
    block_tables: Array,
    kv_lens: Array,
    query_starts: Array,
    layout: KVLayout,
    window: int | None,
    decode: bool,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = block_tables.shape[0]
    if kv.shape[1:] != (layout.rows, LANES):
        raise ValueError(
            f"pool of shape {kv.shape}; {layout} wants [pages, {layout.rows}, {LANES}]"
        )
    if head_dim != layout.head_dim or num_heads % layout.num_kv_heads:
        raise ValueError(f"queries of shape {q.shape} do not fit {layout}")
    if kv_lens.shape != (num_seqs,) or query_starts.shape != (num_seqs + 1,):
        raise ValueError(
            f"{num_seqs} block tables, but kv_lens {kv_lens.shape} and query_starts "
            f"{query_starts.shape}"
        )
    if decode and num_tokens != num_seqs:
        raise ValueError(f"decode takes one query a sequence: {num_tokens} for {num_seqs}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
