"""Sources that are deleted, truncated or replaced while their models sleep."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muxjax import Fleet, SamplingParams
from muxjax.errors import CheckpointError, ModelUnavailable
from muxjax.models.checkpoints import orbax
from muxjax.models.checkpoints.hf import save_hf
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from tests import golden
from tests.models.gguf_files import write_gguf
from tests.models.llama2c_files import write_model
from tests.muxjax.tiny_fleets import fleet

pytestmark = pytest.mark.faults

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
FORMATS = ("hf", "gguf", "orbax", "llama2c")


def write(kind: str, folder: Path, name: str = "llama") -> Path:
    """Writes a tiny model; returns its source."""
    case = golden.tiny(name)
    if kind == "hf":
        save_hf(folder, case.config, case.params, byte_tokenizer(256))
        return folder
    if kind == "orbax":
        orbax.save(folder, case.config, case.params, byte_tokenizer(256))
        return folder
    folder.mkdir(exist_ok=True)
    if kind == "gguf":
        write_gguf(folder / "model.gguf", case.config, case.params)
        return folder / "model.gguf"
    write_model(folder / "model.bin", name)
    return folder / "model.bin"


def delete(kind: str, source: Path) -> None:
    shutil.rmtree(source if source.is_dir() else source.parent)


def truncate(kind: str, source: Path) -> None:
    """Makes the weights' files shorter in place, as a copy does that starts to overwrite them."""
    for path in weight_files(source):
        with path.open("r+b") as file:
            file.truncate(10)


def replace_by_another_model(kind: str, source: Path) -> None:
    delete(kind, source)
    write(kind, source if source.suffix == "" else source.parent, "tinyllama")


def change_bytes(kind: str, source: Path) -> None:
    """Changes the last bytes in place; headers and sizes stay the same."""
    for path in weight_files(source):
        with path.open("r+b") as file:
            file.seek(-64, 2)
            file.write(b"\x3f" * 64)


def weight_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    return [path for path in source.rglob("*") if path.is_file() and path.stat().st_size > 10_000]


def tokens(fleet: Fleet, model: str) -> list[int]:
    return fleet.generate(model, [[1, 2, 3]], GREEDY)[0].token_ids


def fleet_of(folder: Path, *kinds: str, **keys: Any) -> dict[str, Any]:
    """A fleet of one model of each kind, and a neighbor with random weights."""
    file = fleet("qwen3", max_seqs=2, prefill_tokens=16)
    for kind in kinds:
        source = write(kind, folder / kind)
        file["models"].append({"name": kind, "source": str(source), "max_model_len": 32, **keys})
    return file


@pytest.mark.parametrize("damage", [delete, truncate, replace_by_another_model, change_bytes])
def test_only_the_model_of_a_changed_source_fails(
    damage: Callable[[str, Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = fleet_of(tmp_path, *FORMATS, sleeping=True)
    with Fleet.load(file) as fleet_of_five:
        expected = tokens(fleet_of_five, "qwen3")
        engine = fleet_of_five.units[0].engine
        for entry in file["models"][1:]:
            name, source = entry["name"], Path(entry["source"])
            damage(name, source)
            reason = "No such file" if damage is delete else "changed since the model was opened"
            with pytest.raises(ModelUnavailable, match=f"{name} could not be loaded: .*{reason}"):
                tokens(fleet_of_five, name)
            with pytest.raises(ModelUnavailable, match=reason):
                fleet_of_five.stream(name, [1, 2, 3], GREEDY)
            assert fleet_of_five.model_states()[name].status == "failed"
            assert tokens(fleet_of_five, "qwen3") == expected
        assert fleet_of_five.units[0].engine is engine  # the unit was not restarted
        assert not any(record.exc_info for record in caplog.records)


def test_restored_source_is_loaded_again(tmp_path: Path) -> None:
    file = fleet_of(tmp_path, "hf", sleeping=True)
    with Fleet.load(file) as fleet_of_two:
        shutil.move(tmp_path / "hf", tmp_path / "elsewhere")
        with pytest.raises(ModelUnavailable, match="No such file"):
            tokens(fleet_of_two, "hf")
        with pytest.raises(CheckpointError, match="hf: no such file or folder"):
            fleet_of_two.admin.load("hf")
        shutil.move(tmp_path / "elsewhere", tmp_path / "hf")
        fleet_of_two.admin.load("hf")
        assert len(tokens(fleet_of_two, "hf")) == 12


@pytest.mark.parametrize("damage", [delete, truncate])
def test_models_that_were_loaded_need_no_source(
    damage: Callable[[str, Path], None], tmp_path: Path
) -> None:
    file = fleet_of(tmp_path, "gguf")
    with Fleet.load(file) as fleet_of_two:
        expected = tokens(fleet_of_two, "gguf")
        fleet_of_two.admin.sleep("gguf")
        damage("gguf", tmp_path / "gguf" / "model.gguf")
        assert tokens(fleet_of_two, "gguf") == expected
        fleet_of_two.restart("0", "a test")
        assert tokens(fleet_of_two, "gguf") == expected
