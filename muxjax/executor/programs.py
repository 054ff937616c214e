"""The one owner of compiled programs: their buckets, their compilation, and what they need.

Everything is compiled ahead of time, at warm-up; serving only looks programs up, so nothing can
compile later. JAX's persistent cache makes the next start quick.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import PartitionSpec

from muxjax.executor import mesh as meshes
from muxjax.executor import weight_offload as parking
from muxjax.executor.mesh import ModelMesh
from muxjax.executor.slot_state import SlotState
from muxjax.executor.step_functions import StepFunctions, StepOutput
from muxjax.executor.step_inputs import Column, mask_words
from muxjax.models.nn.decoder import Decoder
from muxjax.pallas_kernels.target import current_target
from muxjax.sampling_params import MAX_LOGIT_BIAS


@dataclass(frozen=True)
class Buckets:
    """The sizes that a model's programs are compiled for, of each copy; each list ascends.

    Attributes:
      prefill_tokens: tokens of a prefill, of all chunks together.
      prefill_seqs: chunks of a prefill.
      decode_seqs: sequences of a decode; the last is the most that run at once.
      blocks: blocks of the longest sequence.
    """

    prefill_tokens: tuple[int, ...]
    prefill_seqs: int
    decode_seqs: tuple[int, ...]
    blocks: int

    def __post_init__(self) -> None:
        for sizes in (self.prefill_tokens, self.decode_seqs):
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise ValueError(f"buckets must ascend from 1 or more: {sizes}")

    @property
    def max_seqs(self) -> int:
        return self.decode_seqs[-1]


def bucket(size: int, buckets: Sequence[int]) -> int:
    """The least bucket that holds `size`.

    Raises:
      ValueError: it is larger than the largest bucket.
    """
    for candidate in buckets:
        if size <= candidate:
            return candidate
    raise ValueError(f"{size} is beyond the largest bucket, {buckets[-1]}")


@dataclass(frozen=True)
class Program:
    """A compiled step and what compiling it said.

    Attributes:
      model, kind, size: which one: 'prefill' by tokens, 'decode' by sequences.
      compiled: the executable.
      compile_seconds: tracing, and compiling or reading from the cache.
      temp_bytes: memory it needs besides its arguments and results.
      argument_bytes: its arguments, parameters and pool included.
      peak_bytes: the most that is held at once, arguments included, while it runs.
    """

    model: str
    kind: str
    size: int
    compiled: jax.stages.Compiled
    compile_seconds: float
    temp_bytes: int
    argument_bytes: int
    peak_bytes: int

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model} {self.kind} {self.size}"


class ModelPrograms:
    """The programs of one model.

    Args:
      name: the model's.
      decoder: what one device has of it; its parameters may be shapes only, as `set_parameters`
        brings the arrays.
      functions: the steps, as one device runs them.
      buckets: the sizes.
      kv: the pool's shape and type on one device.
      mesh: where they run.
    """

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        functions: StepFunctions,
        buckets: Buckets,
        kv: jax.ShapeDtypeStruct,
        mesh: ModelMesh,
    ) -> None:
        self.name = name
        self.buckets = buckets
        self._functions = functions
        self._kv = kv
        self.mesh = mesh
        self.vocab_size = decoder.vocab_size
        self._graph, parameters = nnx.split(decoder)
        leaves, self._tree = jax.tree.flatten(parameters)
        self._shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        self.parameters: tuple[jax.Array, ...] = ()
        self._programs: dict[tuple[str, int], Program] = {}

    def set_parameters(self, decoders: Sequence[Decoder]) -> None:
        """Takes the arrays that the programs are called with.

        Args:
          decoders: for each device of the mesh what it has, already there.

        Raises:
          ValueError: they are not of the shapes that the programs are compiled for.
        """
        parts = []
        for decoder in decoders:
            leaves, tree = jax.tree.flatten(nnx.split(decoder)[1])
            found = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
            if tree != self._tree or found != self._shapes:  # type: ignore[operator]
                raise ValueError(f"{self.name}: these parameters are not those of its programs")
            parts.append(leaves)
        whole = [self.mesh.joined(leaf, meshes.PARAMETERS) for leaf in zip(*parts, strict=True)]
        self.parameters = tuple([self._laid_out(leaf) for leaf in whole])

    def _placed(self, leaf: jax.Array) -> jax.Array:
        """A parameter from the host's memory, as the programs want it."""
        there = jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))
        return self._laid_out(there)

    def _laid_out(self, leaf: jax.Array) -> jax.Array:
        if current_target().platform != "tpu":
            return leaf
        return jax.device_put(leaf, self._format(leaf), donate=True)

    @property
    def ready(self) -> bool:
        """Whether all is compiled and the parameters are known, be it on the host."""
        return bool(self.parameters) and len(self._programs) == len(self.wanted())

    def sleep(self) -> None:
        """Moves the parameters to the host's memory; see `parking.py`. Programs stay."""
        self.parameters = parking.offload(
            self.parameters, parking.host_memory(self.mesh.devices[0])
        )

    def wake(self) -> None:
        """Moves the parameters back to the devices.

        Raises:
          JaxRuntimeError: they do not fit; they are on the host still.
        """
        self.parameters = parking.restore(self.parameters, self._placed)

    def free(self) -> None:
        """Frees the parameters, wherever they lie, and forgets the programs."""
        parking.delete(self.parameters)
        self.parameters = ()
        self._programs.clear()

    def wanted(self) -> list[tuple[str, int]]:
        """Kind and size of every program."""
        return [("prefill", size) for size in self.buckets.prefill_tokens] + [
            ("decode", size) for size in self.buckets.decode_seqs
        ]

    def compile(self, kind: str, size: int) -> Program:
        """Compiles one program and keeps it."""
        began = time.perf_counter()
        compiled = self._lower(kind, size).compile()
        memory = compiled.memory_analysis()
        assert memory is not None, "every backend that compiles ahead of time says what it needs"
        program = Program(
            model=self.name,
            kind=kind,
            size=size,
            compiled=compiled,
            compile_seconds=time.perf_counter() - began,
            temp_bytes=memory.temp_size_in_bytes,
            argument_bytes=memory.argument_size_in_bytes,
            peak_bytes=memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes,
        )
        self._programs[kind, size] = program
        return program

    def programs(self) -> list[Program]:
        """All that are compiled."""
        return list(self._programs.values())

    def prefill(self, size: int) -> Callable[..., Any]:
        """`(parameters, kv, state, tokens [size], packed [seqs, ...], targets [size],
        bias [seqs, 2, 300], mask [seqs, W])`; donates kv, state.

        Rows of all copies, one copy after the other.
        """
        return self._programs["prefill", size].compiled

    def decode(self, size: int) -> Callable[..., Any]:
        """`(parameters, kv, state, packed [size, 1 + blocks], mask [size, W], num_tokens)`;
        donates kv, state.

        Rows of all copies, one copy after the other.
        """
        return self._programs["decode", size].compiled

    def _lower(self, kind: str, size: int) -> jax.stages.Lowered:
        def int32(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        def mask(rows: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, mask_words(self.vocab_size)), jnp.uint32)

        blocks, chunks = self.buckets.blocks, self.buckets.prefill_seqs
        rows, same = meshes.ROWS, meshes.SAME
        inputs: tuple[tuple[jax.ShapeDtypeStruct, PartitionSpec], ...] = {
            "prefill": (
                (int32(size), rows),
                (int32(chunks, Column.BLOCKS + blocks), rows),
                (int32(size), rows),
                (int32(chunks, 2, MAX_LOGIT_BIAS), rows),
                (mask(chunks), rows),
            ),
            "decode": ((int32(size, 1 + blocks), rows), (mask(size), rows), (int32(), same)),
        }[kind]
        state = jax.eval_shape(lambda: SlotState.create(self.buckets.max_seqs, self.vocab_size))
        local = (
            (self._shapes, meshes.PARAMETERS),
            (self._kv, meshes.POOL),
            (state, meshes.SLOTS),
            *inputs,
        )
        step = getattr(self._functions, kind)

        def run(
            parameters: tuple[jax.Array, ...], kv: jax.Array, state: SlotState, *inputs: jax.Array
        ) -> tuple[jax.Array, SlotState, tuple[Any, ...], Any]:
            tree = jax.tree.unflatten(self._tree, parameters)
            kv, state, emitted = step(nnx.merge(self._graph, tree), kv, state, *inputs)
            return kv, state, (emitted.tokens, emitted.logprobs), emitted.prompt

        mapped = self.mesh.mapped(
            run,
            tuple(spec for _, spec in local),
            (meshes.POOL, meshes.SLOTS, meshes.EMITTED, meshes.ROWS),
        )

        def run_everywhere(*inputs: Any) -> tuple[jax.Array, SlotState, StepOutput]:
            kv, state, (tokens, logprobs), prompt = mapped(*inputs)
            return kv, state, StepOutput(tokens, logprobs, prompt)

        arguments = [self.mesh.whole(*argument) for argument in local]
        if current_target().platform == "tpu":
            arguments[0] = tuple(self._row_major(leaf) for leaf in arguments[0])
        # A name of its own in profiles, and in the compilation cache's file names.
        run_everywhere.__name__ = f"{kind}_{size}"
        jitted = jax.jit(run_everywhere, donate_argnums=(1, 2))
        if self.mesh.size == 1:
            return jitted.lower(*arguments)
        with self.mesh.tracing():
            return jitted.lower(*arguments)

    def _row_major(self, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=self._format(shape))

    def _format(self, array: jax.ShapeDtypeStruct | jax.Array) -> Format:
        """Row by row, as a lookup of embeddings and products read it.

        Left to itself a TPU lays out a matrix whose rows are no multiple of 128 by columns, and
        then every step copies it: 57 MB of SmolLM2's embedding, 33 MB of its projections. A TPU7x
        reads bfloat16 in tiles of 16 rows, but takes arguments in tiles of 8 unless told: every
        step would copy all weights of a stack of layers (14 GB of Llama 3 8B).
        """
        sharding = self.mesh.sharding(meshes.PARAMETERS)
        rows = tuple(range(len(array.shape)))
        sixteen = current_target().device_kind == "TPU7x" and len(rows) > 1
        if sixteen and array.dtype == jnp.bfloat16:
            return Format(Layout(rows, tiling=((16, 128), (2, 1))), sharding)
        return Format(Layout(rows), sharding)
