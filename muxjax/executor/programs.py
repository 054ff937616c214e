"""The compiled programs of a model: buckets, compilation, and the arrays they are called with.

All programs are compiled ahead of time, at warm-up. Serving only looks them up and compiles
nothing. JAX's persistent cache shortens the next start.
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
from muxjax.executor import weight_offload
from muxjax.executor.mesh import ModelMesh
from muxjax.executor.slot_state import SlotState
from muxjax.executor.step_functions import StepFunctions, StepOutput
from muxjax.executor.step_inputs import Column, mask_words
from muxjax.models.nn.decoder import Decoder
from muxjax.pallas_kernels.target import current_target
from muxjax.sampling_params import MAX_LOGIT_BIAS


@dataclass(frozen=True)
class Buckets:
    """The sizes that a model's programs are compiled for, of one replica; each list ascends.

    Attributes:
      prefill_tokens: tokens of a prefill, of all chunks together.
      prefill_seqs: chunks of a prefill.
      decode_seqs: sequences of a decode; the last is the maximum that run at the same time.
      blocks: blocks of the longest sequence.

    Raises:
      ValueError: a list is empty or does not ascend from 1 or more.
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
        """Maximum number of sequences that run at the same time."""
        return self.decode_seqs[-1]

    @property
    def program_keys(self) -> list[tuple[str, int]]:
        """Kind and size of every program: ('prefill', tokens) and ('decode', sequences)."""
        return [("prefill", size) for size in self.prefill_tokens] + [
            ("decode", size) for size in self.decode_seqs
        ]


def bucket(size: int, buckets: Sequence[int]) -> int:
    """Returns the smallest bucket of at least `size`.

    Raises:
      ValueError: `size` is larger than the largest bucket.
    """
    for candidate in buckets:
        if size <= candidate:
            return candidate
    raise ValueError(f"{size} exceeds the largest bucket, {buckets[-1]}")


@dataclass(frozen=True)
class Program:
    """A compiled step, with the compiler's report.

    Attributes:
      model: name of the model.
      kind: 'prefill' or 'decode'.
      size: its bucket: tokens of a prefill, sequences of a decode.
      compiled: the executable.
      compile_seconds: time to trace and compile it, or to read it from the cache.
      temp_bytes: memory in addition to its arguments and results.
      argument_bytes: memory of its arguments, parameters and pool included.
      peak_bytes: maximum memory while it runs, arguments included.
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
        """Model, kind and size, for display."""
        return f"{self.model} {self.kind} {self.size}"


class ModelPrograms:
    """The programs of one model and its parameters.

    Args:
      name: of the model.
      decoder: one device's part of the model. Its parameters may be shapes only:
        `set_parameters` provides the arrays.
      functions: the steps, as one device runs them.
      buckets: the sizes to compile.
      kv: shape and type of the pool on one device.
      mesh: the devices.

    Attributes:
      parameters: global arrays that the programs are called with; empty until they are set.
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

    # Parameters

    def set_parameters(self, decoders: Sequence[Decoder]) -> None:
        """Sets the arrays that the programs are called with.

        Args:
          decoders: for each device of the mesh that this process drives, its part of the model, on
            that device. Their arrays are donated.

        Raises:
          ValueError: the arrays do not have the shapes that the programs are compiled for.
        """
        shards = []
        for decoder in decoders:
            leaves, tree = jax.tree.flatten(nnx.split(decoder)[1])
            shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
            if tree != self._tree or shapes != self._shapes:  # type: ignore[operator]
                raise ValueError(
                    f"{self.name}: the parameters do not have the shapes of its programs"
                )
            shards.append(leaves)
        arrays = [self.mesh.assemble(leaf, meshes.PARAMETERS) for leaf in zip(*shards, strict=True)]
        self.parameters = tuple([self._set_format(leaf) for leaf in arrays])

    def offload(self) -> None:
        """Moves the parameters to host memory; the programs stay compiled.

        Raises:
          JaxRuntimeError: the host has too little memory; the parameters stay on the devices.
        """
        self.parameters = weight_offload.offload(
            self.parameters, weight_offload.offload_memory_kind(self.mesh.devices[0])
        )

    def restore(self) -> None:
        """Moves the parameters back to the devices.

        Raises:
          JaxRuntimeError: the devices have too little memory; the parameters stay on the host.
        """
        self.parameters = weight_offload.restore(self.parameters, self._copy_to_device)

    def free(self) -> None:
        """Frees the parameters, on host or device, and drops the programs."""
        weight_offload.delete(self.parameters)
        self.parameters = ()
        self._programs.clear()

    def _copy_to_device(self, leaf: jax.Array) -> jax.Array:
        return self._set_format(jax.device_put(leaf, leaf.sharding.with_memory_kind("device")))

    def _set_format(self, leaf: jax.Array) -> jax.Array:
        """Returns a parameter in the layout that the programs expect; donates it."""
        if current_target().platform != "tpu":
            return leaf
        return jax.device_put(leaf, self._format(leaf), donate=True)

    # Programs

    @property
    def ready(self) -> bool:
        """Whether all programs are compiled and the parameters are set, offloaded or not."""
        return bool(self.parameters) and len(self._programs) == len(self.buckets.program_keys)

    def compile(self, kind: str, size: int) -> Program:
        """Compiles and stores one program."""
        began = time.perf_counter()
        compiled = self._lower(kind, size).compile()
        memory = compiled.memory_analysis()
        assert memory is not None, "every backend that compiles ahead of time reports its memory"
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
        """Returns all programs that are compiled."""
        return list(self._programs.values())

    def prefill(self, size: int) -> Callable[..., Any]:
        """Returns the prefill for `size` tokens.

        `(parameters, kv, state, tokens [size], packed [seqs, ...], targets [size],
        bias [seqs, 2, 300], mask [seqs, W]) -> (kv, state, StepOutput)`; donates kv and state.
        Tokens and rows are grouped by replica.
        """
        return self._programs["prefill", size].compiled

    def decode(self, size: int) -> Callable[..., Any]:
        """Returns the decode for `size` sequences.

        `(parameters, kv, state, packed [size, 1 + blocks], mask [size, W], num_tokens) ->
        (kv, state, StepOutput)`; donates kv and state. Rows are grouped by replica.
        """
        return self._programs["decode", size].compiled

    def _lower(self, kind: str, size: int) -> jax.stages.Lowered:
        state = jax.eval_shape(lambda: SlotState.create(self.buckets.max_seqs, self.vocab_size))
        local = (
            (self._shapes, meshes.PARAMETERS),
            (self._kv, meshes.POOL),
            (state, meshes.SLOTS),
            *self._input_shapes(kind, size),
        )
        step = getattr(self._functions, kind)

        def run(
            parameters: tuple[jax.Array, ...], kv: jax.Array, state: SlotState, *inputs: jax.Array
        ) -> tuple[jax.Array, SlotState, tuple[Any, ...], Any]:
            tree = jax.tree.unflatten(self._tree, parameters)
            kv, state, output = step(nnx.merge(self._graph, tree), kv, state, *inputs)
            return kv, state, (output.tokens, output.logprobs), output.prompt

        sharded = self.mesh.shard_map(
            run,
            tuple(spec for _, spec in local),
            (meshes.POOL, meshes.SLOTS, meshes.OUTPUTS, meshes.ROWS),
        )

        def run_sharded(*inputs: Any) -> tuple[jax.Array, SlotState, StepOutput]:
            kv, state, (tokens, logprobs), prompt = sharded(*inputs)
            return kv, state, StepOutput(tokens, logprobs, prompt)

        arguments = [self.mesh.global_shapes(*argument) for argument in local]
        if current_target().platform == "tpu":
            arguments[0] = tuple(
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._format(leaf))
                for leaf in arguments[0]
            )
        # The name appears in profiles and in the file names of the compilation cache.
        run_sharded.__name__ = f"{kind}_{size}"
        jitted = jax.jit(run_sharded, donate_argnums=(1, 2))
        if self.mesh.size == 1:
            return jitted.lower(*arguments)
        with self.mesh.tracing():
            return jitted.lower(*arguments)

    def _input_shapes(
        self, kind: str, size: int
    ) -> tuple[tuple[jax.ShapeDtypeStruct, PartitionSpec], ...]:
        """Returns shape and spec of each input that the host sends, on one device."""

        def int32(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        def mask(rows: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, mask_words(self.vocab_size)), jnp.uint32)

        blocks, chunks, rows = self.buckets.blocks, self.buckets.prefill_seqs, meshes.ROWS
        if kind == "prefill":
            return (
                (int32(size), rows),
                (int32(chunks, Column.BLOCKS + blocks), rows),
                (int32(size), rows),
                (int32(chunks, 2, MAX_LOGIT_BIAS), rows),
                (mask(chunks), rows),
            )
        return (int32(size, 1 + blocks), rows), (mask(size), rows), (int32(), meshes.REPLICATED)

    def _format(self, array: jax.ShapeDtypeStruct | jax.Array) -> Format:
        """Returns the row-major layout that embedding lookups and matrix products read.

        By default a TPU stores a matrix by columns if its row length is not a multiple of 128.
        Every step would copy it. A TPU7x reads bfloat16 in tiles of 16 rows, but its default for
        arguments is tiles of 8. Every step would copy all stacked weights.
        """
        sharding = self.mesh.sharding(meshes.PARAMETERS)
        axes = tuple(range(len(array.shape)))
        tiles_of_16 = current_target().device_kind == "TPU7x" and len(axes) > 1
        if tiles_of_16 and array.dtype == jnp.bfloat16:
            return Format(Layout(axes, tiling=((16, 128), (2, 1))), sharding)
        return Format(Layout(axes), sharding)
