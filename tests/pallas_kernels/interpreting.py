"""Runs kernels in Pallas's interpreter on machines without their device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import jax
from jax.experimental.pallas import tpu as pltpu

from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.cpu import native
from tests.pallas_kernels.cases import build_layout

TPU = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


GPU_INTERPRETER = jax.__version_info__ >= (0, 12) or jax.default_backend() == "gpu"
"""Whether the GPU kernels can run: the interpreter of JAX 0.11 lacks operations that they use."""


class RaceDetected(AssertionError):
    """A kernel read or wrote memory that a copy in flight may still use."""


@contextmanager
def _interpret_tpu() -> Iterator[None]:
    pltpu.reset_tpu_interpret_mode_state()
    try:
        with pltpu.force_tpu_interpret_mode(TPU):
            yield
    except jax.errors.JaxRuntimeError as error:
        if "race" in str(error).lower():
            raise RaceDetected(str(error)) from error
        raise
    if jax.__version_info__ < (0, 12):  # prints races instead of raising an error
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        races = interpret_pallas_call.races
        if races is not None and races.races_found:
            raise RaceDetected("see the output")


def _interpret_gpu() -> AbstractContextManager[None]:
    if jax.default_backend() == "gpu":
        return nullcontext()  # compiled for the device
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    return plgpu.force_gpu_interpret_mode(params)


INTERPRETERS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "mosaic_tpu": _interpret_tpu,
    "mosaic_gpu": _interpret_gpu,
}
"""The context in which each interpreted implementation is traced and run."""


@contextmanager
def interpreted(name: str) -> Iterator[None]:
    """The context that the named implementation needs on this machine."""
    with INTERPRETERS.get(name, nullcontext)():
        yield


def interpretable(name: str) -> bool:
    """Whether the named implementation can run on this machine, compiled or interpreted."""
    if name == "native":
        return native.unavailable_reason() is None
    return name != "mosaic_gpu" or GPU_INTERPRETER


def size_case(name: str, geometry: tuple[int, int, int]) -> tuple[tuple[int, int, int], KVLayout]:
    """The geometry and pages with which an implementation is tested.

    The GPU's interpreter is slow for each block of threads: one per KV head in decode, one per
    query head in prefill. It is tested with at most two KV heads and half the query heads of each.
    Pages are a multiple of tokens, since tokens of other pages are copied separately;
    `gpu/test_paged_attention.py` has small tests of those.
    """
    if name != "mosaic_gpu":
        return geometry, build_layout(geometry)
    num_heads, num_kv, head_dim = geometry
    small_kv, group = min(num_kv, 2), -(-num_heads // num_kv // 2)
    rows = KVLayout(10**6, small_kv, head_dim).rows_per_token * 16
    return (group * small_kv, small_kv, head_dim), KVLayout(rows, small_kv, head_dim)
