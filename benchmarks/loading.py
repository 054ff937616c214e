"""Time and host memory of loading weights onto several devices, from safetensors and Orbax.

    python benchmarks/loading.py [--devices 4] [--runs 5] [--layers 16] [--stored float32]

A model with random weights is written in both formats and loaded as bfloat16 onto `--devices`
virtual CPU devices, sharded over all of them, several times in alternation. `ratio` is the ratio
of the medians. The safetensors are bfloat16, or `--stored float32`; the Orbax folder is their
conversion by `muxjax convert --dtype bfloat16`.

Host memory is the increase of the process's anonymous memory (Linux's RssAnon, sampled every
millisecond) minus the arrays on the devices at that time, relative to the bytes of one device's
shard. The limit is 1.3. Mapped files belong to the page cache and are not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

LIMIT = 1.3
M_MMAP_THRESHOLD = -3
"""A parameter of glibc's mallopt."""


def main() -> None:
    """Measures both formats and prints the result."""
    parser = argparse.ArgumentParser(description="Measure loading of weights.")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--stored", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={arguments.devices}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), arguments.layers, arguments.stored)
        report = measure(Path(folder), arguments.devices, arguments.runs)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for form in ("safetensors", "orbax"):
        row = report[form]
        spread = f"from {row['least']:.2f} to {row['most']:.2f}"
        peak = f"{row['host_bytes'] / 1e6:.1f} MB, {row['host_share']:.2f}"
        shard = f"{report['device_bytes'] / 1e6:.1f} MB"
        print(
            f"{form:<12} {row['seconds']:.2f} s ({spread}); host peak {peak} of a shard of {shard}"
        )
    print(f"orbax takes {report['ratio']:.2f} of the time of safetensors; host limit {LIMIT}")


def write(folder: Path, layers: int, stored: str) -> None:
    """Writes the model in both formats."""
    import jax

    from muxjax.models.checkpoints.convert import convert
    from muxjax.models.checkpoints.hf import open_hf, save_hf
    from muxjax.models.checkpoints.loading import open_checkpoint

    shape = {
        "vocab_size": 32000,
        "num_hidden_layers": layers,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 512,
    }
    random = open_checkpoint("config:llama", config_mapping=shape)
    params = {
        name: array.astype(jax.numpy.dtype(stored), copy=False) for name, array in random.weights()
    }
    save_hf(folder / "safetensors", random.config, params)
    convert(open_hf(folder / "safetensors"), folder / "orbax", "bfloat16")


def measure(folder: Path, devices: int, runs: int) -> dict[str, Any]:
    """Loads the model and returns its time and host memory."""
    seconds: dict[str, list[float]] = {"safetensors": [], "orbax": []}
    for form in seconds:  # warm up
        device_bytes, _ = load(folder / form, devices)
    for run in range(runs):
        for form in seconds:
            began = time.perf_counter()
            load(folder / form, devices)
            seconds[form].append(time.perf_counter() - began)
        print(f"run {run + 1} of {runs}", file=sys.stderr)
    peaks = {form: host_peak(partial(load, folder / form, devices)) for form in seconds}
    medians = {form: statistics.median(times) for form, times in seconds.items()}
    return {
        "devices": devices,
        "device_bytes": device_bytes,
        "ratio": medians["orbax"] / medians["safetensors"],
        **{
            form: {
                "seconds": medians[form],
                "least": min(times),
                "most": max(times),
                "host_bytes": peaks[form],
                "host_share": peaks[form] / device_bytes,
            }
            for form, times in seconds.items()
        },
    }


def host_peak(work: Callable[[], object]) -> int:
    """Peak host memory of a call in bytes, without arrays on the devices."""
    import jax

    def on_devices() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def watch() -> None:
        while not done.wait(0.001):
            arrived, resident = on_devices(), anonymous_bytes()
            if on_devices() == arrived:  # nothing arrived in between
                peaks.append(resident - arrived)

    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 17)  # return freed memory to the system at once
    libc.malloc_trim(0)
    before = anonymous_bytes() - on_devices()
    peaks, done = [before], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        # Kept until the watcher stops: arrays are deleted before their memory is freed.
        _kept = work()
    finally:
        done.set()
        watcher.join()
    return max(peaks) - before


def anonymous_bytes() -> int:
    """Anonymous memory of the process, in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this kernel does not report RssAnon")


def load(folder: Path, devices: int) -> tuple[int, object]:
    """Loads a model without compiling it; returns bytes per device and the weights."""
    import jax
    from flax import nnx

    from muxjax.config.fleet_file import load_fleet_config
    from muxjax.units.build_unit_spec import build_unit_spec
    from muxjax.units.weights import load_weights

    entry = {"name": "model", "source": str(folder), "dtype": "bfloat16"}
    config = load_fleet_config(
        {"models": [entry], "tensor_parallel": devices, "pool": {"memory": "256MB"}}
    )
    plan = build_unit_spec(config)
    decoders = load_weights(plan.model_specs["model"], lambda size: None)
    jax.block_until_ready([nnx.split(decoder)[1] for decoder in decoders])
    return plan.models["model"].param_bytes, decoders


if __name__ == "__main__":
    main()
