"""How an implementation is run where its device is not: in Pallas's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.cpu import native
from muxjax.pallas_kernels.gpu import paged_attention as mosaic_gpu
from tests.pallas_kernels.cases import layout_of

TPU = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


class Raced(AssertionError):
    """A kernel read or wrote what a copy was not known to have finished with."""


@contextmanager
def _interpret_tpu() -> Iterator[None]:
    pltpu.reset_tpu_interpret_mode_state()
    try:
        with pltpu.force_tpu_interpret_mode(TPU):
            yield
    except jax.errors.JaxRuntimeError as error:  # JAX 0.12 raises
        if "race" in str(error).lower():
            raise Raced(str(error)) from error
        raise
    races = interpret_pallas_call.races
    if races is not None and races.races_found:  # JAX 0.10 prints
        raise Raced("see what was printed")


def _interpret_gpu() -> AbstractContextManager[None]:
    if jax.default_backend() == "gpu":
        return nullcontext()  # the real thing
    # Imported here: JAX 0.10 has no such interpreter.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    return plgpu.force_gpu_interpret_mode(params)


INTERPRETERS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "mosaic_tpu": _interpret_tpu,
    "mosaic_gpu": _interpret_gpu,
}
"""For each implementation that the CPU must interpret, the context to trace and run it in."""


@contextmanager
def interpreted(name: str) -> Iterator[None]:
    """The context that the named implementation needs on this machine."""
    with INTERPRETERS.get(name, nullcontext)():
        yield


def interpretable(name: str) -> bool:
    """Whether the installed JAX can run the named implementation on this machine."""
    if name == "native":
        return native.unavailable_reason() is None
    return name != "mosaic_gpu" or jax.__version_info__ >= mosaic_gpu.FIRST_JAX


def sized(name: str, geometry: tuple[int, int, int]) -> tuple[tuple[int, int, int], KVLayout]:
    """The geometry and pages that an implementation is tested with.

    The GPU's interpreter takes a tenth of a second for each block of threads, and there is one for
    each KV head in decode, for each query head in prefill: it gets two KV heads at most, and half
    the query heads of each. And it gets pages of whole tokens, since the others' tokens are copied
    one by one, which takes it half a minute; `test_mosaic_gpu` has them, on a small scale.
    """
    if name != "mosaic_gpu":
        return geometry, layout_of(geometry)
    num_heads, num_kv, head_dim = geometry
    kept, group = min(num_kv, 2), -(-num_heads // num_kv // 2)
    rows = KVLayout(10**6, kept, head_dim).rows_per_token * 16
    return (group * kept, kept, head_dim), KVLayout(rows, kept, head_dim)
