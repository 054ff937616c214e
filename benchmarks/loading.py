"""Loading weights onto several devices: seconds from safetensors and from Orbax, and host memory.

A model of random weights is written in both forms (bfloat16) and loaded onto `--devices` devices
that one CPU shows itself as, cut for all of them, several times in turn. The ratio is that of the
medians. Host memory is the most that numpy held at once while a model was loaded (tracemalloc; what
lies on the devices is not counted), against the bytes of a device's part; the limit is 1.3 of it.

    python benchmarks/loading.py [--devices 4] [--runs 5] [--layers 16] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

LIMIT = 1.3


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure loading.")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={arguments.devices}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.devices, arguments.runs, arguments.layers)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for form in ("safetensors", "orbax"):
        took = found[form]
        spread = f"from {took['least']:.2f} to {took['most']:.2f}"
        peak = f"{took['host_bytes'] / 1e6:.1f} MB, {took['host_share']:.2f}"
        part = f"{found['device_bytes'] / 1e6:.1f} MB"
        print(
            f"{form:<12} {took['seconds']:.2f} s ({spread}); host peak {peak} of a device's {part}"
        )
    print(f"orbax takes {found['ratio']:.2f} of the time of safetensors; host limit {LIMIT}")


def measure(folder: Path, devices: int, runs: int, layers: int) -> dict[str, Any]:
    """Writes the model, loads it, and says what it took."""
    import ml_dtypes

    from muxjax.models.convert import convert
    from muxjax.models.hf import open_hf, save_hf
    from muxjax.models.loading import open_checkpoint

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
    params = {name: array.astype(ml_dtypes.bfloat16) for name, array in random.weights()}
    save_hf(folder / "safetensors", random.config, params)
    del params
    convert(open_hf(folder / "safetensors"), folder / "orbax")

    seconds: dict[str, list[float]] = {"safetensors": [], "orbax": []}
    peaks: dict[str, int] = {}
    for form in seconds:  # what is slow the first time, and memory, which slows numpy down
        tracemalloc.start()
        device_bytes = load(folder / form, devices)
        peaks[form] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    for run in range(runs):
        for form in seconds:
            began = time.perf_counter()
            load(folder / form, devices)
            seconds[form].append(time.perf_counter() - began)
        print(f"run {run + 1} of {runs}", file=sys.stderr)
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


def load(folder: Path, devices: int) -> int:
    """Loads a model as a fleet would, without compiling; returns the bytes of one device's part."""
    import jax
    from flax import nnx

    from muxjax import loading
    from muxjax.config import load_fleet_config
    from muxjax.weights import load_weights

    entry = {"name": "model", "source": str(folder), "dtype": "bfloat16"}
    config = load_fleet_config(
        {"models": [entry], "tensor_parallel": devices, "pool": {"memory": "256MB"}}
    )
    plan = loading.make_plan(config)
    decoders = load_weights(plan.parts["model"], lambda size: None)
    jax.block_until_ready([nnx.split(decoder)[1] for decoder in decoders])
    return plan.models["model"].param_bytes


if __name__ == "__main__":
    main()
