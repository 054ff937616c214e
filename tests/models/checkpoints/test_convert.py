import gc
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints import convert as converting
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.checkpoints.convert import convert
from muxjax.models.checkpoints.hf import open_hf, save_hf
from muxjax.models.checkpoints.loading import open_checkpoint
from muxjax.models.nn.shards import Shards
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from tests import golden


@pytest.fixture
def source(tmp_path: Path):
    case = golden.tiny("smollm2")
    save_hf(tmp_path / "source", case.config, case.params, byte_tokenizer(256))
    return open_hf(tmp_path / "source")


def test_converted_checkpoint_equals_its_source(source, tmp_path: Path) -> None:
    size = convert(source, tmp_path / "deep" / "dest")
    converted = open_checkpoint(tmp_path / "deep" / "dest")
    params = dict(source.weights())
    assert size == sum(array.nbytes for array in params.values())
    assert converted.config == source.config
    assert converted.tokenizer is not None
    shards = Shards(source.config, 4)
    for name, array in params.items():
        for device in range(4):
            shard = converted.read_shard(name, shards, device)
            np.testing.assert_array_equal(shard, shards.shard_param(name, array, device))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["dest"]


def test_dtype_applies_to_matrices_only(source, tmp_path: Path) -> None:
    convert(source, tmp_path / "dest", "bfloat16")
    for name, array in open_checkpoint(tmp_path / "dest").weights():
        small = name.endswith("norm")
        assert array.dtype == (np.float32 if small else ml_dtypes.bfloat16)


def test_one_parameter_is_in_memory_at_a_time(source, tmp_path: Path, monkeypatch) -> None:
    references: list[weakref.ref] = []
    live_counts = []

    def read_param(self, name: str) -> np.ndarray:
        gc.collect()
        live_counts.append(sum(reference() is not None for reference in references))
        array = read(self, name)
        references.append(weakref.ref(array))
        return array

    read = Checkpoint.read_param
    monkeypatch.setattr(Checkpoint, "read_param", read_param)
    convert(source, tmp_path / "dest")
    assert len(live_counts) > 10
    assert max(live_counts) <= 2  # one being written, one not yet released by TensorStore


def test_interrupted_conversion_leaves_no_folder(source, tmp_path: Path, monkeypatch) -> None:
    def interrupted(folder: Path, *args: object) -> None:
        (folder / "params").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(converting.orbax, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "dest")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_checkpoint_without_config_is_rejected(source, tmp_path: Path) -> None:
    convert(source, tmp_path / "dest")
    (tmp_path / "dest" / "muxjax.json").unlink()  # the last file that is written
    with pytest.raises(CheckpointError, match=r"incomplete, it has no muxjax.json"):
        open_checkpoint(tmp_path / "dest")


def test_existing_folder_is_not_overwritten(source, tmp_path: Path) -> None:
    (tmp_path / "dest").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "dest")
