"""What the optimised HLO of a compiled program says: copies of an array, Pallas kernels."""

from __future__ import annotations

import math
import re

import jax
import numpy as np

_NAMES = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}
_COPY = re.compile(r"^\s*(?:ROOT )?(\S+) = \(?(\w+)\[([\d,]*)\].*? (?:copy|copy-start)\(")
_OP_NAME = re.compile(r'op_name="(?:[^"]*/)?(\w+)/\w+"')
_KERNEL = re.compile(
    r"^\s*(?:ROOT )?%?([\w.-]+) = .*custom_call_target=\"(?:tpu_custom_call|mosaic_gpu_v2)\""
)
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1",[^}]*"size":"(\d+)"')


def copies_of(hlo: str, array: jax.ShapeDtypeStruct) -> list[str]:
    """Names of the instructions that copy an array of this type and size, whatever its shape."""
    kind, size = _NAMES[np.dtype(array.dtype).name], math.prod(array.shape)
    found = []
    for line in hlo.splitlines():
        match = _COPY.match(line)
        if match and match[2] == kind and _count(match[3]) == size:
            found.append(match[1])
    return found


def _count(shape: str) -> int:
    return math.prod(int(n) for n in shape.split(",") if n)


def kernels(hlo: str) -> dict[str, int | None]:
    """The Pallas kernels in a program, and the bytes of VMEM that each takes; None on a GPU, where
    the program does not say.
    """
    found: dict[str, int | None] = {}
    for line in hlo.splitlines():
        if match := _KERNEL.match(line):
            op, used = _OP_NAME.search(line), _VMEM.search(line)
            # The name that the kernel was given; without, the instruction's, less its number.
            name = op[1] if op else re.sub(r"\.\d+$", "", match[1])
            found[name] = int(used[1]) if used else found.get(name)
    return found
