"""Opening a checkpoint of each kind of source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from muxjax.errors import CheckpointError, DownloadError, FleetConfigError
from muxjax.models.checkpoints import orbax
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.checkpoints.hf import save_hf
from muxjax.models.checkpoints.loading import open_checkpoint
from tests import golden
from tests.models.gguf_files import write_gguf
from tests.models.llama2c_files import write_model

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_open_checkpoint_detects_the_format(tmp_path: Path) -> None:
    case = golden.tiny("llama")
    write_gguf(tmp_path / "model.gguf", case.config, case.params)
    write_model(tmp_path / "model.bin", "llama")
    save_hf(tmp_path / "hf", case.config, case.params)
    orbax.save(tmp_path / "orbax", case.config, case.params)
    for name in ("model.gguf", "model.bin", "hf", "orbax"):
        for source in (tmp_path / name, str(tmp_path / name)):
            checkpoint = open_checkpoint(source)
            assert checkpoint.config.hidden_size == 64
            assert checkpoint.origin == str(tmp_path / name)


def test_random_weights_from_a_config_mapping() -> None:
    checkpoint = open_checkpoint("config:qwen3", config_mapping=SMALL | {"seed": 5})
    assert checkpoint.config.family == "qwen3"
    assert checkpoint.config.head_dim == 128
    assert checkpoint.origin == "config:qwen3"
    with pytest.raises(FleetConfigError, match=r"config.hidden_sizes is not a key of llama; known"):
        open_checkpoint("config:llama", config_mapping=SMALL | {"hidden_sizes": 3})
    with pytest.raises(FleetConfigError, match=r"config.seed must be a whole number, not 'x'"):
        open_checkpoint("config:llama", config_mapping=SMALL | {"seed": "x"})
    with pytest.raises(CheckpointError, match="unknown family 'rwkv'; known: llama"):
        open_checkpoint("config:rwkv")


def test_config_mapping_requires_a_config_source(tmp_path: Path) -> None:
    with pytest.raises(FleetConfigError, match="requires a source `config:FAMILY`, not demo:x"):
        open_checkpoint("demo:x", config_mapping=SMALL)


def test_missing_sources_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match=r"neither config.json nor muxjax.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(DownloadError, match="no demo model 'llama9'; there are smollm2-135m"):
        open_checkpoint("demo:llama9")


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden.tiny("llama")
    save_hf(tmp_path / "hub", case.config, case.params)
    requests = []

    def fetch(name: str, *, progress: bool) -> Path:
        requests.append((name, progress))
        return tmp_path / "hub"

    monkeypatch.setattr("muxjax.models.download.hub.fetch_from_hub", fetch)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("some-org/Some.Model-1B", progress=False).config == case.config
    open_checkpoint("org/name@v1.0")
    assert requests == [("some-org/Some.Model-1B", False), ("org/name@v1.0", True)]
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint("a/b/c")


def test_demo_model_opens(demo_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = demo_checkpoint("smollm2-135m")
    assert checkpoint.config.num_layers == 30
    assert checkpoint.config.tie_embeddings
