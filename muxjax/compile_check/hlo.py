"""Reads the optimized HLO of a compiled program: copies of an array, kernels, collectives."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter

import jax
import numpy as np

_NAMES = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}
_COPY = re.compile(r"^\s*(?:ROOT )?(\S+) = \(?(\w+)\[([\d,]*)\].*? (?:copy|copy-start)\(")
_OP_NAME = re.compile(r'op_name="(?:[^"]*/)?(\w+)/\w+"')
_KERNEL = re.compile(
    r"^\s*(?:ROOT )?%?([\w.-]+) = .*custom_call_target=\"(?:tpu_custom_call|mosaic_gpu_v2)\""
)
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1",[^}]*"size":"(\d+)"')
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(|\{).*\{\s*$")
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"%?([\w.-]+) = s32\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"ROOT .* compare\(.*%([\w.-]+)\), direction=LT")
_CALLED = re.compile(r"(?:body|calls|to_apply|\w+_computations?)=(%?[\w.-]+|\{[^}]*\})")


def find_copies(hlo: str, array: jax.ShapeDtypeStruct) -> list[str]:
    """Returns the names of instructions that copy an array of this type and size, in any shape."""
    kind, size = _NAMES[np.dtype(array.dtype).name], math.prod(array.shape)
    names = []
    for line in hlo.splitlines():
        match = _COPY.match(line)
        if match and match[2] == kind and _count(match[3]) == size:
            names.append(match[1])
    return names


def _count(shape: str) -> int:
    return math.prod(int(n) for n in shape.split(",") if n)


def find_kernels(hlo: str) -> dict[str, int | None]:
    """Returns the bytes of VMEM by Pallas kernel of a program.

    On a GPU the bytes are None: the program does not contain them.
    """
    kernels: dict[str, int | None] = {}
    for line in hlo.splitlines():
        if match := _KERNEL.match(line):
            op, used = _OP_NAME.search(line), _VMEM.search(line)
            # The kernel's name; without one, the instruction's name without its number.
            name = op[1] if op else re.sub(r"\.\d+$", "", match[1])
            kernels[name] = int(used[1]) if used else kernels.get(name)
    return kernels


def count_collectives(hlo: str) -> dict[str, int]:
    """Returns the number of executions of each kind of collective.

    A collective in a loop with a constant trip count counts once per trip. One in any other loop,
    such as the loop over a decode's tokens, counts once. Every branch of a conditional counts.
    """
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif name:
            bodies[name].append(line)

    @functools.cache
    def count(computation: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for line in bodies.get(computation, ()):
            if match := _COLLECTIVE.search(line):
                total[match[1]] += 1
            times = 1
            if trips := _TRIPS.search(line):
                times = int(trips[1])
            elif condition := _CONDITION.search(line):
                times = _trip_count(bodies.get(condition[1], []))
            for called in _CALLED.findall(line):
                for callee in re.findall(r"%?([\w.-]+)", called):
                    for kind, number in count(callee).items():
                        total[kind] += times * number
        return total

    return dict(sorted(count(entry).items()))


def _trip_count(condition: list[str]) -> int:
    """Returns the constant that a loop's counter is compared with; 1 for any other condition."""
    constants = {m[1]: int(m[2]) for line in condition if (m := _CONSTANT.search(line))}
    for line in condition:
        if (match := _LESS.search(line)) and match[1] in constants:
            return constants[match[1]]
    return 1
