from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from muxjax.errors import CheckpointError, DownloadError, FleetConfigError
from muxjax.models.checkpoints.config_only import DEMO_SHAPES, read_shape
from muxjax.models.checkpoints.loading import open_checkpoint
from muxjax.models.download.demo import fetch_demo
from muxjax.models.download.demo_models import DEMO_MODELS
from tests import golden
from tests.models.gguf_files import write_gguf

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def folder(tmp_path: Path, **changes: object) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(tmp_path)


def test_folder_needs_no_weights(tmp_path: Path) -> None:
    shape = read_shape(folder(tmp_path))
    assert (shape.config.num_layers, shape.config.num_kv_heads) == (2, 2)
    assert shape.weight_bits is None
    assert read_shape(str(tmp_path / "config.json")) == shape


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "fp8"}, 8.0),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.0),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8.0),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
    ],
)
def test_weight_bits_of_quantized_checkpoints(
    tmp_path: Path, quantization: dict[str, Any], bits: float
) -> None:
    assert read_shape(folder(tmp_path, quantization_config=quantization)).weight_bits == bits


def test_unknown_quantization_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="unknown for the method 'magic'"):
        read_shape(folder(tmp_path, quantization_config={"quant_method": "magic"}))


def test_config_source() -> None:
    plain = {key: value for key, value in CONFIG.items() if key != "architectures"}
    shape = read_shape("config:qwen3", plain | {"seed": 3})
    assert (shape.config.family, shape.config.head_dim) == ("qwen3", 128)


@pytest.mark.parametrize("name", list(DEMO_MODELS))
def test_demo_shapes_match_the_checkpoints(name: str) -> None:
    assert set(DEMO_SHAPES) == set(DEMO_MODELS)
    table = read_shape(f"demo:{name}").config
    actual = read_shape(str(fetch_demo(name, progress=False))).config
    for field in (
        "vocab_size", "num_layers", "hidden_size", "intermediate_size", "num_heads",
        "num_kv_heads", "head_dim", "max_position", "tie_embeddings", "qk_norm", "post_norms",
    ):  # fmt: skip
        assert getattr(table, field) == getattr(actual, field), field


def test_orbax_folder(tmp_path: Path) -> None:
    case = golden.tiny("gemma3_softcaps")
    contents = {"format": 1, "config": dataclasses.asdict(case.config)}
    (tmp_path / "muxjax.json").write_text(json.dumps(contents))
    assert read_shape(str(tmp_path)).config == case.config


def test_gguf_file(tmp_path: Path) -> None:
    case = golden.tiny("llama3")
    write_gguf(tmp_path / "tiny.gguf", case.config, case.params)
    config = read_shape(str(tmp_path / "tiny.gguf")).config
    assert config.num_layers == case.config.num_layers
    assert config.num_kv_heads == case.config.num_kv_heads


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        ("config:llama", {"hiden_size": 64}, r"config\.hiden_size is not a key of llama"),
        ("config:llama", {"seed": "one"}, r"config\.seed must be a whole number, not 'one'"),
        ("demo:stories15m", {"hidden_size": 64}, "`config` requires a source `config:FAMILY`"),
    ],
)
def test_invalid_config_is_rejected_as_in_loading(
    source: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(FleetConfigError, match=message):
        read_shape(source, config)
    with pytest.raises(FleetConfigError, match=message):
        open_checkpoint(source, config_mapping=config)


def test_invalid_sources_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        read_shape(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"neither config\.json nor muxjax\.json"):
        read_shape(str(tmp_path))
    with pytest.raises(DownloadError, match="no demo model 'x'"):
        read_shape("demo:x")
    with pytest.raises(CheckpointError, match="GPT2"):
        read_shape(folder(tmp_path, architectures=["GPT2LMHeadModel"]))
