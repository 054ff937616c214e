"""Time to wake a model from sleep, relative to loading it, and memory over many cycles.

    python benchmarks/wake.py [--source demo:smollm2-135m] [--cycles 100] [--json]

Loads a fleet of this model and a small second model, and measures in the same process:

- load: loading after an unload: weights are read, and programs come from JAX's cache;
- wake: waking after a sleep;
- first token: time to first token of a request to the sleeping and to the awake model.

On a CPU, weights stay in host memory during sleep. In the `moved` row, weights are copied to
another memory space of the host and back, as on a device with separate memory (at the speed of host
memory instead of the device's link). Weights are compared byte for byte after every tenth cycle.
`memory` is the resident memory of the process and its slope over the cycles, without the first
tenth.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from muxjax import Fleet, SamplingParams
from muxjax.executor import weight_offload
from muxjax.units.local_unit import LocalUnit

MODEL = "model"
CHECK = 10
ONE = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


def main() -> None:
    """Measures all cases and prints the result."""
    parser = argparse.ArgumentParser(description="Time to wake a model, and to load it.")
    parser.add_argument("--source", default="demo:smollm2-135m")
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument(
        "--repeats", type=int, default=5, help="number of measurements; medians are shown"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    file = {
        "models": [
            {"name": MODEL, "source": arguments.source, "max_model_len": 1024},
            {"name": "other", "source": "demo:stories15m"},
        ],
        "pool": {"memory": "256MB"},
        "engine": {"max_seqs": 8},
    }
    with Fleet.load(file) as fleet:
        report = measure(fleet, arguments.repeats, arguments.cycles)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


def measure(fleet: Fleet, repeats: int, cycles: int) -> dict[str, Any]:
    """Measures all cases, in seconds and bytes."""
    fleet.generate(MODEL, "Once", ONE)
    loads = []
    for _ in range(max(1, repeats // 2)):
        fleet.admin.unload(MODEL)
        loads.append(seconds(lambda: fleet.admin.load(MODEL)))
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "weights": fleet.models[MODEL].param_bytes,
        "load": median(loads),
        "awake_first_token": median(
            [seconds(lambda: fleet.generate(MODEL, "Once", ONE)) for _ in range(repeats)]
        ),
    }
    report["as it is"] = _sleeping(fleet, repeats, cycles)
    if weight_offload.offload_memory_kind(jax.devices()[0]) is None:
        weight_offload.offload_memory_kind = lambda device: "pinned_host"
        report["moved"] = _sleeping(fleet, repeats, cycles)
    for mode in ("as it is", "moved"):
        if mode in report:
            report[mode]["load_over_wake"] = report["load"] / report[mode]["wake"]
    return report


def _sleeping(fleet: Fleet, repeats: int, cycles: int) -> dict[str, Any]:
    sleeps, wakes, firsts = [], [], []
    for _ in range(repeats):
        sleeps.append(seconds(lambda: fleet.admin.sleep(MODEL)))
        wakes.append(seconds(lambda: fleet.admin.wake(MODEL)))
        fleet.admin.sleep(MODEL)
        firsts.append(seconds(lambda: fleet.generate(MODEL, "Once", ONE)))
    process, memory, expected, wrong = psutil.Process(), [], digest(fleet), 0
    for cycle in range(1, cycles + 1):
        fleet.admin.sleep(MODEL)
        fleet.admin.wake(MODEL)
        if cycle % CHECK == 0 or cycle == cycles:
            wrong += digest(fleet) != expected
        memory.append(process.memory_info().rss)
    settled = memory[cycles // 10 :]
    slope = np.polyfit(range(len(settled)), settled, 1)[0] if len(settled) > 1 else 0.0
    return {
        "sleep": median(sleeps),
        "wake": median(wakes),
        "first_token": median(firsts),
        "cycles": cycles,
        "other_weights_found": wrong,
        "memory_first": settled[0],
        "memory_last": settled[-1],
        "memory_slope": float(slope),
    }


def digest(fleet: Fleet) -> str:
    """Digest of the bytes of all weights."""
    unit = fleet.units[0]
    assert isinstance(unit, LocalUnit)
    weights_hash = hashlib.blake2b()
    for leaf in unit.programs[MODEL].parameters:
        weights_hash.update(np.asarray(leaf))
    return weights_hash.hexdigest()


def seconds(action: Callable[[], object]) -> float:
    """Duration of a call in seconds."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def show(report: dict[str, Any]) -> None:
    """Prints the result as tables."""
    console = Console()
    console.print(
        f"{report['device']}, {report['weights'] / 1e6:.0f} MB of weights: loaded in "
        f"{report['load']:.2f} s, first token when awake {1e3 * report['awake_first_token']:.0f} ms"
    )
    table = Table(
        "", "sleep ms", "wake ms", "load / wake", "first token ms", "other weights", "memory"
    )
    for mode in ("as it is", "moved"):
        if mode in report:
            row = report[mode]
            table.add_row(
                mode,
                f"{1e3 * row['sleep']:.1f}",
                f"{1e3 * row['wake']:.1f}",
                f"{row['load_over_wake']:.0f}",
                f"{1e3 * row['first_token']:.0f}",
                f"{row['other_weights_found']} in {row['cycles']}",
                f"{row['memory_first'] / 1e6:.0f} -> {row['memory_last'] / 1e6:.0f} MB, "
                f"{row['memory_slope'] / 1e3:+.1f} kB per cycle",
            )
    console.print(table)


if __name__ == "__main__":
    main()
