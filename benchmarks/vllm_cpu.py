"""Measures vLLM's CPU build with the requests of concurrency.py, as a reference for MuxJAX.

Runs in a separate environment with vLLM and without MuxJAX (see README.md):

    python benchmarks/vllm_cpu.py
    python benchmarks/vllm_cpu.py --dtype bfloat16 --threads 0 --json

The model has SmolLM2-135M's shape and random weights, which do not affect the time of a step. Each
type runs in a separate process, after a warm-up round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

DTYPES = ("float32", "bfloat16")
RESULT = "result.json"
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main() -> None:
    """Measures each type and prints the result."""
    parser = argparse.ArgumentParser(description="Measure vLLM's CPU build.")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: both")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="output tokens of each request")
    parser.add_argument("--runs", type=int, default=5, help="number of runs; medians are shown")
    parser.add_argument("--threads", help="cores to use, in the form of VLLM_CPU_OMP_THREADS_BIND")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtypes = arguments.dtype or list(DTYPES)
    if arguments.measure:
        result = measure(arguments.measure, dtypes[0], arguments)
        # Not to standard output, which has the messages of vLLM.
        Path(arguments.measure, RESULT).write_text(json.dumps(result), "utf-8")
        return
    rows = [measure_in_process(dtype, arguments) for dtype in dtypes]
    if arguments.json:
        print(json.dumps({"rows": rows}, indent=2))
        return
    for row in rows:
        print(
            f"vLLM {row['vllm']}, {row['dtype']}: {row['output_tokens/s']:.0f} output tokens/s "
            f"(median of {arguments.runs}; {row['lowest']:.0f} to {row['highest']:.0f})"
        )


def measure_in_process(dtype: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Measures one type in a separate process; returns a row of the table."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    if arguments.threads:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = arguments.threads
    sizes = {name: getattr(arguments, name) for name in ("requests", "prompt", "output", "runs")}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        command = [sys.executable, __file__, "--measure", folder, "--dtype", dtype]
        command += [f"--{name}={size}" for name, size in sizes.items()]
        process = subprocess.run(command, env=environment, stdout=sys.stderr)
        if process.returncode:
            sys.exit(f"vLLM failed with {dtype}; its messages are above")
        return json.loads(Path(folder, RESULT).read_text("utf-8"))


def write_model(folder: Path) -> None:
    """Writes a folder from which `load_format="dummy"` builds a random model."""
    (folder / "config.json").write_text(json.dumps(SHAPE), "utf-8")


def measure(folder: str, dtype: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Runs the requests several times."""
    import vllm  # only needed by the measuring process

    llm = vllm.LLM(
        model=folder,
        dtype=dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max(256, arguments.prompt + arguments.output),
        max_num_seqs=arguments.requests,
        enable_prefix_caching=False,
    )
    params = vllm.SamplingParams(
        temperature=0, max_tokens=arguments.output, ignore_eos=True, detokenize=False
    )
    rates = []
    for run in range(arguments.runs + 1):
        ids = random.Random(run)
        prompts = [
            {"prompt_token_ids": [ids.randrange(3, 49152) for _ in range(arguments.prompt)]}
            for _ in range(arguments.requests)
        ]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        generated = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert generated == arguments.requests * arguments.output, "a request ended early"
        if run > 0:  # the first run warms up
            rates.append(generated / seconds)
    return {
        "vllm": vllm.__version__,
        "dtype": dtype,
        "output_tokens/s": median(rates),
        "lowest": min(rates),
        "highest": max(rates),
    }


if __name__ == "__main__":
    main()
