"""Names of the targets to compile for, and the environment that their compilers need.

Imports no JAX: the environment must be set before JAX is imported.
"""

from __future__ import annotations

import os
import re

from muxjax.compile_check.gpu_targets import GPU_TARGETS
from muxjax.errors import MuxError

_TPU = re.compile(r"(v[2-9][a-z]*|tpu7x):\d+x\d+(x\d+)?")
_GPUS = re.compile(r"(?:([1-9]\d*)x)?(\w+)")


class TargetUnavailable(MuxError):
    """The target is unknown or too small, or its compiler is not installed."""


def set_environment(target: str) -> None:
    """Configures JAX and the compilers not to look for devices. Call before importing JAX.

    Raises:
      TargetUnavailable: the target is unknown.
    """
    # Otherwise JAX looks for GPU libraries, whatever the target, and warns.
    variables = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    if _TPU.fullmatch(target):
        # By default libtpu queries the cloud's metadata server, and locks the chip.
        variables |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_LOG_DIR": "disabled",
            "TPU_ACCELERATOR_TYPE": "v5litepod-1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_MIN_LOG_LEVEL": "3",
        }
    elif parse_gpus(target) is not None:
        variables |= {"JAX_PLATFORMS": "cpu,cuda"}
    else:
        raise TargetUnavailable(
            f"no target {target!r}: a TPU slice such as v5e:2x2, v6e:2x2, v5p:2x2x1 or "
            f"tpu7x:2x2x1, or one of {', '.join(GPU_TARGETS)}; 8xh100 for several"
        )
    os.environ.update(variables)


def parse_gpus(target: str) -> tuple[int, str] | None:
    """Returns number and kind of the GPUs of `h100` or `8xh100` (one machine); None otherwise."""
    match = _GPUS.fullmatch(target)
    if match is None or match[2] not in GPU_TARGETS:
        return None
    return int(match[1] or 1), match[2]
