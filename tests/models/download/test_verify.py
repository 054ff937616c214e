"""Digests of every kind of source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from muxjax.errors import CheckpointError, DownloadError
from muxjax.models.checkpoints.convert import convert
from muxjax.models.checkpoints.hf import open_hf, save_hf
from muxjax.models.digests import sha256_of, write_sums
from muxjax.models.download import demo
from muxjax.models.download.demo_models import DEMO_MODELS, DemoFile
from muxjax.models.download.verify import FileCheck, find_digests
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from tests import golden

pytestmark = pytest.mark.faults


def check(source: object) -> dict[str, FileCheck]:
    """The results for a source, by file name; of files with one name, a bad one."""
    sizes: list[int] = []
    stored = find_digests(str(source))
    results = sorted(stored.check(sizes.append), key=lambda result: result.state != "ok")
    checks = {Path(result.path).name: result for result in results}
    assert sum(sizes) == stored.num_bytes
    return checks


def states(source: object) -> dict[str, str]:
    return {name: result.state for name, result in check(source).items()}


def change_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def demo_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a demo model `toy` of two files; returns their folder."""
    monkeypatch.setenv("MUXJAX_CACHE", str(tmp_path))
    folder = tmp_path / "demo" / "toy"
    folder.mkdir(parents=True)
    files = []
    for name in ("model", "terms"):
        (folder / name).write_text(name * 100)
        size = (folder / name).stat().st_size
        files.append(DemoFile(name, size, sha256_of(folder / name), ()))
    toy = replace(DEMO_MODELS["stories15m"], name="toy", files=tuple(files))
    monkeypatch.setattr(demo, "DEMO_MODELS", {"toy": toy})
    return folder


def test_demo_model(demo_cache: Path) -> None:
    assert states("demo:toy") == {"model": "ok", "terms": "ok"}
    change_a_byte(demo_cache / "model")
    (demo_cache / "terms").unlink()
    checks = check("demo:toy")
    assert checks["model"].message == (
        f"{demo_cache / 'model'}: damaged, its digest differs from the stored one: "
        "run `muxjax fetch toy`"
    )
    assert checks["terms"].message.endswith("terms: missing: run `muxjax fetch toy`")


def test_real_demo_model(demo_checkpoint: Callable[[str], object]) -> None:
    demo_checkpoint("smollm2-135m")
    assert states("demo:smollm2-135m") == {"SmolLM2-135M-Instruct.Q4_1.gguf": "ok"}


def test_converted_model(tmp_path: Path) -> None:
    case = golden.tiny("llama")
    save_hf(tmp_path / "hf", case.config, case.params, byte_tokenizer(256))
    assert states(tmp_path / "hf") == {}
    convert(open_hf(tmp_path / "hf"), tmp_path / "dest")
    assert set(states(tmp_path / "dest").values()) == {"ok"}
    for path in find_digests(str(tmp_path / "dest")).digests:
        content = path.read_bytes()
        change_a_byte(path)
        wrong = [result for result in check(tmp_path / "dest").values() if result.state != "ok"]
        assert [(result.path, result.state) for result in wrong] == [(str(path), "damaged")]
        assert "convert the model again" in wrong[0].remedy
        path.write_bytes(content)


def test_single_file_with_sums(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path, {name: sha256_of(tmp_path / name) for name in ("a.gguf", "b.gguf")})
    change_a_byte(tmp_path / "b.gguf")
    assert states(tmp_path / "a.gguf") == {"a.gguf": "ok"}
    assert states(tmp_path / "b.gguf") == {"b.gguf": "damaged"}
    assert states(tmp_path) == {"a.gguf": "ok", "b.gguf": "damaged"}


def test_sources_without_files() -> None:
    assert states("config:llama") == {}
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_digests("/nowhere/model.gguf")
    with pytest.raises(DownloadError, match="no demo model 'unknown'"):
        find_digests("demo:unknown")
