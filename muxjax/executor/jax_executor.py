"""Runs steps on the device: the real `Executor`.

The pool is one array that only the executor touches. It is donated to every step and returned by
it, so its address never changes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.errors import EngineDead
from muxjax.executor import mesh as meshes
from muxjax.executor.host_memory import keep_freed_memory
from muxjax.executor.mesh import ModelMesh
from muxjax.executor.model_slots import ModelSlots, allocate_slots
from muxjax.executor.programs import ModelPrograms
from muxjax.executor.step_functions import StepOutput
from muxjax.executor.step_packing import pack_decode, pack_prefill
from muxjax.executor.step_results import (
    JaxStepHandle,
    read_logprobs,
    read_prompt_logprobs,
    read_tokens,
)
from muxjax.scheduling.steps import Prefill, Step, StepResult

_POISON_BATCH = 64
"""Pages that one call of the poison program fills."""


class JaxExecutor:
    """See `muxjax.scheduling.steps.Executor`.

    Args:
      devices: of the unit.
      models: compiled programs by model name, with their parameters.
      kv: shape `[P, rows, 128]` and type of the pool on one device.
      dummy_pages: number of pages at the start of the pool that padding is written to.
      poison: test mode: all other pages are NaN until a step writes them. Enables `poison`.
    """

    def __init__(
        self,
        devices: tuple[jax.Device, ...],
        models: Mapping[str, ModelPrograms],
        kv: jax.ShapeDtypeStruct,
        *,
        dummy_pages: int,
        poison: bool = False,
    ) -> None:
        mesh = ModelMesh(devices)
        pool = mesh.global_shapes(kv, meshes.POOL)
        self._num_pages = kv.shape[0]
        self._kv: jax.Array | None = jnp.zeros(pool.shape, pool.dtype, device=pool.sharding)
        self._poison = None
        if poison:
            self._poison = _compile_poison(mesh, kv)
            self.poison(range(dummy_pages, kv.shape[0]))
        self._models = {name: allocate_slots(programs) for name, programs in models.items()}
        self._last_ended = 0.0
        if devices[0].platform == "cpu":
            keep_freed_memory()

    def add_model(self, name: str, model: ModelSlots) -> None:
        """Adds a model, from `allocate_slots`; see `Executor.add_model`."""
        self._models[name] = model

    def remove_model(self, name: str) -> None:
        """Frees a model's slots; see `Executor.remove_model`."""
        del self._models[name]

    @property
    def pool_address(self) -> int:
        """Address of the pool's first shard in memory; it never changes."""
        return self._pool.addressable_shards[0].data.unsafe_buffer_pointer()

    @property
    def _pool(self) -> jax.Array:
        if self._kv is None:
            raise EngineDead("the executor is closed")
        return self._kv

    def submit(self, step: Step) -> JaxStepHandle:
        """Queues a step; see `Executor.submit`."""
        submitted = time.perf_counter()
        model = self._models[step.model]
        if isinstance(step, Prefill):
            packed = pack_prefill(model, step, self._num_pages)
        else:
            packed = pack_decode(model, step, self._num_pages)
        output = self.launch(step.model, packed.kind, packed.size, packed.inputs)
        return JaxStepHandle(step, packed, output, submitted)

    def launch(
        self, name: str, kind: str, size: int, inputs: Sequence[np.ndarray | None]
    ) -> StepOutput:
        """Dispatches a program of a model. All hosts of a mesh must use the same order.

        Args:
          name: of the model.
          kind: 'prefill' or 'decode'.
          size: its bucket.
          inputs: host arrays, as `ModelPrograms` takes them; None for a default input.
        """
        model = self._models[name]
        programs = model.programs
        program = programs.prefill(size) if kind == "prefill" else programs.decode(size)
        self._kv, model.state, output = program(
            programs.parameters,
            self._pool,
            model.state,
            *model.default_inputs.fill(kind, size, inputs),
        )
        return output

    def result(self, handle: JaxStepHandle) -> StepResult:
        """Waits for a step; see `Executor.result`."""
        tokens_array = np.asarray(handle.output.tokens)  # k S
        ended = time.perf_counter()
        started = max(handle.submitted, self._last_ended)
        self._last_ended = ended
        tokens = read_tokens(handle, tokens_array)
        logprobs = read_logprobs(handle, tokens)
        return StepResult(tokens, logprobs, started, ended - started, read_prompt_logprobs(handle))

    def poison(self, pages: Sequence[int]) -> None:
        """Fills pages with NaN; see `PoisonsPages.poison`.

        Raises:
          ValueError: the executor was created without `poison=True`.
        """
        if self._poison is None:
            raise ValueError("this executor was created without poison=True")
        pages = list(pages)
        for start in range(0, len(pages), _POISON_BATCH):
            batch = np.full(_POISON_BATCH, self._num_pages, np.int32)  # beyond the pool: dropped
            filled = pages[start : start + _POISON_BATCH]
            batch[: len(filled)] = filled
            self._kv = self._poison(self._pool, batch)

    def close(self) -> None:
        """Frees the pool and the slots; parameters are freed with their programs."""
        if self._kv is not None:
            self._kv.delete()
            self._kv = None
        self._models.clear()


def _compile_poison(mesh: ModelMesh, kv: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """Compiles `(kv, pages [_POISON_BATCH]) -> kv`, which fills pages with NaN on every device.

    Donates kv.
    """

    def fill(kv: jax.Array, pages: jax.Array) -> jax.Array:
        return kv.at[pages].set(jnp.nan, mode="drop")

    pages = jax.ShapeDtypeStruct((_POISON_BATCH,), jnp.int32)
    program = jax.jit(
        mesh.shard_map(fill, (meshes.POOL, meshes.REPLICATED), meshes.POOL), donate_argnums=0
    )
    return program.lower(
        mesh.global_shapes(kv, meshes.POOL), mesh.global_shapes(pages, meshes.REPLICATED)
    ).compile()
