"""Orbax checkpoints: round trips and invalid files."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints import orbax, orbax_reader
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from tests import golden


@pytest.mark.parametrize("name", ["llama3", "gemma3_softcaps"])
def test_weights_and_config_round_trip(name: str, tmp_path: Path) -> None:
    case = golden.tiny(name)
    orbax.save(tmp_path / "model", case.config, case.params, byte_tokenizer(256))
    config, params = orbax_reader.restore(tmp_path / "model")
    assert config == case.config
    assert list(params) == list(case.params)
    for canonical, array in params.items():
        np.testing.assert_array_equal(array, case.params[canonical])
    tokenizer = orbax_reader.open_orbax(tmp_path / "model").tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("hi") == [104, 105]


def test_jax_arrays_in_bfloat16(tmp_path: Path) -> None:
    case = golden.tiny("qwen2")
    params = {name: jnp.asarray(array, jnp.bfloat16) for name, array in case.params.items()}
    orbax.save(tmp_path, case.config, params)
    checkpoint = orbax_reader.open_orbax(tmp_path)
    assert checkpoint.tokenizer is None
    for name, array in checkpoint.weights():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, np.asarray(params[name]))


def test_save_replaces_an_earlier_checkpoint(tmp_path: Path) -> None:
    for name in ("llama", "smollm2"):
        case = golden.tiny(name)
        orbax.save(tmp_path, case.config, case.params)
    config, params = orbax_reader.restore(tmp_path)
    assert config == case.config
    np.testing.assert_array_equal(params["embed"], case.params["embed"])


def test_quantized_weights_are_rejected(tmp_path: Path) -> None:
    case = golden.tiny("llama")
    params = case.params | {"layers.0.qkv": case.params["layers.0.qkv"].astype(np.int8)}
    with pytest.raises(CheckpointError, match="qkv is int8: checkpoints store float32 or bfloat16"):
        orbax.save(tmp_path, case.config, params)


def test_mismatches_are_rejected(tmp_path: Path) -> None:
    case = golden.tiny("llama")
    with pytest.raises(CheckpointError, match="final_norm: no array"):
        orbax.save(
            tmp_path,
            case.config,
            {"embed": case.params["embed"]}
            | {name: array for name, array in case.params.items() if name != "final_norm"},
        )
    orbax.save(tmp_path, case.config, case.params)
    path = tmp_path / orbax_reader.CONFIG_FILE
    contents = json.loads(path.read_text())
    changed = contents["config"] | {"num_layers": 3, "layer_is_sliding": [False] * 3}
    path.write_text(json.dumps(contents | {"config": changed}))
    with pytest.raises(CheckpointError, match=r"layers.2.attn_norm \[64\] is missing"):
        orbax_reader.open_orbax(tmp_path)
    path.write_text(json.dumps(contents | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads 1"):
        orbax_reader.open_orbax(tmp_path)
    path.write_text(json.dumps({"format": 1, "config": {"family": "llama"}}))
    with pytest.raises(CheckpointError, match="not a valid config"):
        orbax_reader.open_orbax(tmp_path)


def test_folder_without_parameters_is_rejected(tmp_path: Path) -> None:
    case = golden.tiny("llama")
    orbax.save(tmp_path, case.config, case.params)
    path = tmp_path / orbax_reader.CONFIG_FILE
    contents = json.loads(path.read_text())
    del contents["files"]  # as older versions wrote it
    path.write_text(json.dumps(contents))
    assert orbax_reader.open_orbax(tmp_path).config == case.config
    (tmp_path / orbax_reader.PARAMS_FOLDER).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not an Orbax checkpoint"):
        orbax_reader.open_orbax(tmp_path)


def test_orbax_restores_the_parameters(tmp_path: Path) -> None:
    case = golden.tiny("llama")
    orbax.save(tmp_path, case.config, case.params)
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / orbax_reader.PARAMS_FOLDER)
    np.testing.assert_array_equal(tree["embed"], case.params["embed"])
    np.testing.assert_array_equal(tree["layers"]["1"]["o"], case.params["layers.1.o"])


def test_damaged_parameter_raises_checkpoint_error(tmp_path: Path) -> None:
    case = golden.tiny("llama")
    orbax.save(tmp_path, case.config, case.params)
    checkpoint = orbax_reader.open_orbax(tmp_path)
    for path in (tmp_path / orbax_reader.PARAMS_FOLDER).rglob("d/*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="cannot read embed"):
        checkpoint.read_param("embed")
