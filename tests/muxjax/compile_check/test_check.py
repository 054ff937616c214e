"""Steps compiled by the real compilers for devices that are not present."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from muxjax.compile_check import check as compile_check
from muxjax.compile_check.check import CheckedProgram, CompileCheck, check_faults, check_table
from muxjax.compile_check.devices import DescribedDevices
from muxjax.compile_check.targets import TargetUnavailable

# Llama 3 8B, SmolLM2 135M (once in int8) and Gemma 3 270M by shape; weights are shapes only.
LLAMA = {
    "vocab_size": 128256,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
SMOLLM2 = {
    "vocab_size": 49152,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
GEMMA = {
    "vocab_size": 262144,
    "num_hidden_layers": 18,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
}
MODELS = {
    "llama": ("llama", LLAMA, "none"),
    "smollm2": ("llama", SMOLLM2, "none"),
    "gemma": ("gemma3", GEMMA, "none"),
}


def fleet_file(folder: Path, llama_layers: int, pool: str = "4GB") -> Path:
    models = [
        {
            "name": name,
            "source": f"config:{family}",
            "config": dict(config),
            "quantization": quantization,
        }
        for name, (family, config, quantization) in MODELS.items()
    ]
    models[0]["config"]["num_hidden_layers"] = llama_layers
    fleet = {
        "models": models,
        "pool": {"memory": pool},
        "engine": {"max_seqs": 8, "prefill_tokens": 1024},
    }
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet))
    return path


def run_check(fleet: Path, target: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "muxjax", "compile-check", str(fleet), "--target", target]
    return subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=3600, check=False
    )


def check_steps(folder: Path, target: str, llama_layers: int, pool: str = "4GB") -> None:
    done = run_check(fleet_file(folder, llama_layers, pool), target)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["pool_bytes"] > 3.9e9
    assert {(p["model"], p["kind"]) for p in report["programs"]} == {
        (model, kind) for model in MODELS for kind in ("prefill", "decode")
    }
    for program in report["programs"]:
        print(target, program["name"], program["kernels"], f"{program['compile_seconds']:.0f} s")
        assert program["error"] is None
        assert program["fits"] is True
        assert program["pool_copies"] == 0, program
        assert program["temp_bytes"] < 0.02 * report["pool_bytes"], program
        assert program["kernels"], "the step does not use a Pallas kernel"


@pytest.mark.aot_tpu
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs muxjax[tpu]")
@pytest.mark.parametrize(
    ("target", "llama_layers", "pool"),
    # Sixteen gigabytes hold half of the layers of Llama 3 8B, the other models and the pool. A
    # TPU7x has half the VMEM of a v6e and needs more temporary memory: below 2% of this pool.
    [("v5e:2x2", 16, "4GB"), ("v6e:2x2", 32, "4GB"), ("tpu7x:2x2x1", 32, "16GB")],
)
def test_steps_compile_for_tpus(tmp_path, target, llama_layers, pool):
    check_steps(tmp_path, target, llama_layers, pool)


@pytest.mark.aot_tpu
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs muxjax[tpu]")
def test_fleet_that_does_not_fit_is_reported(tmp_path):
    fleet = yaml.safe_load(fleet_file(tmp_path, 32).read_text())
    fleet["models"] = fleet["models"][:1]
    fleet["engine"] = {"max_seqs": 1, "prefill_tokens": 16}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    done = run_check(tmp_path / "fleet.yaml", "v5e:2x2")
    assert done.returncode == 1, done.stderr[-2000:]
    for program in json.loads(done.stdout)["programs"]:
        assert program["fits"] is False
        assert "memory" in program["error"]


@pytest.mark.aot_cuda
@pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="needs muxjax[aot-cuda]")
def test_steps_compile_for_hopper(tmp_path):
    # XLA's GPU backend needs more temporary memory; it is below 2% of this pool.
    check_steps(tmp_path, "h100", 32, "16GB")


def test_unknown_target_is_rejected(tmp_path):
    done = run_check(fleet_file(tmp_path, 1), "abacus")
    assert done.returncode == 2
    assert "no target 'abacus': a TPU slice such as v5e:2x2" in done.stderr
    assert "Traceback" not in done.stderr


def program(**fields) -> CheckedProgram:
    return CheckedProgram(name="chat decode 8", model="chat", kind="decode", size=8, **fields)


def test_table_and_faults_of_a_failed_program(capsys):
    good = program(
        compile_seconds=3.2,
        argument_bytes=5 * 10**9,
        temp_bytes=2 * 10**6,
        peak_bytes=5 * 10**9,
        resident_bytes=6 * 10**9,
        pool_copies=0,
        kernels={"paged_decode_9_3_64": 1_359_000},
        fits=True,
    )
    bad = program(fits=False, error="RESOURCE_EXHAUSTED: out of memory")
    check = CompileCheck("v5e:2x2", "TPU v5 lite", 1, 16 << 30, 10**9, 4 * 10**9, [good, bad])
    assert not check.passed
    assert check.as_json()["programs"][0]["temp_bytes"] == 2 * 10**6
    assert check_faults(check) == [
        "chat decode 8 does not compile: RESOURCE_EXHAUSTED: out of memory"
    ]
    from rich.console import Console

    Console(width=200).print(check_table(check))
    shown = capsys.readouterr().out
    for text in ("TPU v5 lite", "3.2 s", "2.0 MB", "paged_decode_9_3_64 1.4 MB", "yes", "no"):
        assert text in shown
    assert compile_check.CompileCheck("", "", 1, None, 1, 1, [good]).passed


def llama_shape(**sizes: object) -> dict:
    return {**LLAMA, **sizes}


LLAMA_3B = llama_shape(
    num_hidden_layers=28,
    hidden_size=3072,
    intermediate_size=8192,
    num_attention_heads=24,
    head_dim=128,
    tie_word_embeddings=True,
)
LLAMA_1B = llama_shape(
    num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, tie_word_embeddings=True
)
LLAMA_70B = llama_shape(
    num_hidden_layers=80, hidden_size=8192, intermediate_size=28672, num_attention_heads=64
)
# The 1B model is not sharded: it has eight replicas, and no collectives.
FOUR = {"a": (LLAMA, None), "b": (LLAMA, None), "c": (LLAMA_3B, None), "d": (LLAMA_1B, 1)}


def check_over_a_mesh(folder: Path, target: str, models: dict, pool: str) -> None:
    """Checks a decode and a prefill of each model, compiled for eight devices."""
    entries = []
    for name, (config, tp_size) in models.items():
        settings = {} if tp_size is None else {"tensor_parallel": tp_size}
        entries.append({"name": name, "source": "config:llama", "config": config, **settings})
    fleet = {
        "models": entries,
        "tensor_parallel": 8,
        "pool": {"memory": pool},
        "engine": {"max_seqs": 8, "prefill_tokens": 16},
    }
    (folder / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    done = run_check(folder / "fleet.yaml", target)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["devices"] == 8
    for program in report["programs"]:
        print(target, program["name"], program["collectives"], program["peak_bytes"])
        assert program["fits"] is True
        assert program["pool_copies"] == 0
        config, tp_size = models[program["model"]]
        # Two all-reduces per layer, one for the embedding, and a gather of the logits, which may
        # be an all-reduce too. A prefill also gathers the logits for prompt log-probabilities.
        gathers = 2 if "prefill" in program["name"] else 1
        sums = 2 * config["num_hidden_layers"] + 1
        wanted = 0 if tp_size == 1 else sums + gathers
        assert sum(program["collectives"].values()) == wanted
        if wanted:
            assert sums <= program["collectives"]["all-reduce"] <= wanted


@pytest.mark.aot_tpu
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs muxjax[tpu]")
@pytest.mark.parametrize(
    ("target", "models", "pool"),
    [("v5e:2x4", FOUR, "40GB"), ("v6e:2x4", {"large": (LLAMA_70B, None)}, "60GB")],
)
def test_steps_compile_for_several_tpus(tmp_path, target, models, pool):
    check_over_a_mesh(tmp_path, target, models, pool)


@pytest.mark.aot_cuda
@pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="needs muxjax[aot-cuda]")
def test_70b_compiles_for_eight_hoppers(tmp_path):
    # Takes minutes on one core.
    check_over_a_mesh(tmp_path, "8xh100", {"large": (LLAMA_70B, None)}, "40GB")


def test_target_with_too_few_devices_is_rejected():
    described = DescribedDevices("v5e:2x2", (None,) * 4, None)
    with pytest.raises(TargetUnavailable, match="tensor_parallel is 8, and v5e:2x2 has 4 devices"):
        described.first(8)
