"""Hugging Face folders: round trips, shards, number types and invalid files."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.hf import open_hf, save_hf
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from tests import golden


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    case = golden.tiny("llama")
    save_hf(tmp_path / "llama", case.config, case.params, byte_tokenizer(256))
    return tmp_path / "llama"


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors; dots are written as two underscores."""
    tensors = load_file(folder / "model.safetensors")
    for key, array in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = array
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", golden.tiny_names())
def test_weights_and_config_round_trip(name: str, tmp_path: Path) -> None:
    case = golden.tiny(name)
    save_hf(tmp_path, case.config, case.params)
    checkpoint = open_hf(tmp_path)
    assert checkpoint.config == case.config
    assert checkpoint.tokenizer is None
    assert checkpoint.origin == str(tmp_path)
    weights = dict(checkpoint.weights())
    assert list(weights) == list(case.params)
    for canonical, array in weights.items():
        np.testing.assert_allclose(array, case.params[canonical], rtol=0, atol=1e-6)


def test_tokenizer_is_saved_and_read(llama: Path) -> None:
    tokenizer = open_hf(llama).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("hi") == [104, 105]
    assert tokenizer.eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("stored", "read"),
    [(ml_dtypes.bfloat16, ml_dtypes.bfloat16), (np.float16, np.float32), (np.float64, np.float32)],
)
def test_number_types(llama: Path, stored: type, read: type) -> None:
    path = llama / "model.safetensors"
    save_file({name: array.astype(stored) for name, array in load_file(path).items()}, path)
    params = golden.tiny("llama").params
    for name, array in open_hf(llama).weights():
        assert array.dtype == read
        np.testing.assert_array_equal(array, params[name].astype(stored).astype(read))


def test_gemma_norms_keep_their_precision_in_bfloat16(tmp_path: Path) -> None:
    case = golden.tiny("gemma3")
    save_hf(tmp_path, case.config, case.params)
    path = tmp_path / "model.safetensors"
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(path).items()}
    save_file(tensors, path)
    weights = dict(open_hf(tmp_path).weights())
    assert weights["final_norm"].dtype == np.float32
    stored = tensors["model.norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(weights["final_norm"], 1 + stored)


def test_shards_with_an_index(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, file_names in files.items():
        save_file({name: tensors[name] for name in file_names}, llama / file)
    index = {
        "weight_map": {name: file for file, file_names in files.items() for name in file_names}
    }
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    params = golden.tiny("llama").params
    for name, array in open_hf(llama).weights():
        np.testing.assert_array_equal(array, params[name])
    (llama / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing files of the index: model-00002-of-00002"):
        open_hf(llama)


def test_tensor_in_two_files_is_rejected(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").rename(llama / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, llama / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"model.norm.weight is in both a.* and b"):
        open_hf(llama)


def test_unused_tensors_are_ignored(llama: Path, tmp_path: Path) -> None:
    rewrite(llama, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(8, np.float32))
    assert open_hf(llama).config.num_layers == 2
    tied = golden.tiny("qwen2")
    save_hf(tmp_path / "tied", tied.config, tied.params)
    rewrite(tmp_path / "tied", lm_head__weight=np.zeros((128, 64), np.float32))
    assert "head" not in dict(open_hf(tmp_path / "tied").weights())


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_text_part_of_an_image_model(layout: str, tmp_path: Path) -> None:
    case = golden.tiny("gemma3")
    save_hf(tmp_path, case.config, case.params)
    path = tmp_path / "model.safetensors"
    tensors = {name.replace("model.", layout, 1): array for name, array in load_file(path).items()}
    tensors["vision_tower.encoder.weight"] = np.ones((2, 2), np.float32)
    tensors["multi_modal_projector.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, path)
    inner = json.loads((tmp_path / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    checkpoint = open_hf(tmp_path)
    assert checkpoint.config == case.config
    np.testing.assert_array_equal(dict(checkpoint.weights())["embed"], case.params["embed"])


def test_mismatched_tensors_are_named_in_the_error(llama: Path) -> None:
    good = load_file(llama / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    rewrite(llama, model__layers__1__mlp__up_proj__weight=good[:5])
    with pytest.raises(
        CheckpointError,
        match=r"layers.1.mlp.up_proj.weight has shape \[5, 64\], expected \[96, 64\]",
    ):
        open_hf(llama)
    rewrite(llama, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight \[96, 64\] is missing"):
        open_hf(llama)
    rewrite(llama, model__layers__1__mlp__up_proj__weight=good, model__odd=np.ones(3, np.float32))
    with pytest.raises(CheckpointError, match=r"does not have: model.odd"):
        open_hf(llama)
    rewrite(llama, model__odd=None, model__norm__weight=np.ones(64, np.int8))
    with pytest.raises(CheckpointError, match="is int8: quantized safetensors"):
        list(open_hf(llama).weights())


def test_truncated_file_is_rejected(llama: Path) -> None:
    path = llama / "model.safetensors"
    data = path.read_bytes()
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="truncated or unreadable"):
            open_hf(llama)


def test_architecture_is_checked_before_the_weights(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"broken")
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(CheckpointError, match=r"unknown architecture .GPT2LMHeadModel"):
        open_hf(llama)


def test_invalid_config_is_rejected(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not JSON"):
        open_hf(llama)
    (llama / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        open_hf(llama)


def test_folder_without_safetensors_is_rejected(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        open_hf(llama)


def test_incomplete_models_are_not_saved(tmp_path: Path) -> None:
    case = golden.tiny("llama")
    params = dict(case.params)
    head = params.pop("head")
    with pytest.raises(CheckpointError, match="head: no array, expected"):
        save_hf(tmp_path / "a", case.config, params)
    with pytest.raises(CheckpointError, match=r"head: shape \[127, 64\], expected \[128, 64\]"):
        save_hf(tmp_path / "b", case.config, params | {"head": head[1:]})
