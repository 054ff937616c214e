"""Conversions that are killed, run at the same time, or cannot write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints import convert as converting
from muxjax.models.checkpoints import orbax
from muxjax.models.checkpoints.convert import convert
from muxjax.models.checkpoints.hf import open_hf, save_hf
from muxjax.models.checkpoints.loading import open_checkpoint
from muxjax.models.digests import read_sums
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from tests import golden
from tests.limited import ROOT, run_muxjax

pytestmark = pytest.mark.faults

KILLS = 10


@pytest.fixture
def source(tmp_path: Path) -> Path:
    case = golden.tiny("tinyllama")
    save_hf(tmp_path / "source", case.config, case.params, byte_tokenizer(256))
    return tmp_path / "source"


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ".unfinished" in path.name]


def assert_complete(dest: Path, source: Path) -> None:
    converted = dict(open_checkpoint(dest).weights())
    for name, array in open_checkpoint(source).weights():
        np.testing.assert_array_equal(converted[name], array)


def test_killed_conversion_is_complete_or_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    script = Path(__file__).with_name("killed_conversions.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, script, source, out, str(KILLS)], env=environment, timeout=300, check=True
    )
    assert_complete(out / "whole", source)
    for index in range(KILLS):
        dest = out / str(index)
        if dest.exists():
            assert_complete(dest, source)
        else:
            with pytest.raises(CheckpointError, match=r"incomplete: its conv|no such file"):
                open_checkpoint(dest)
    unfinished = leftovers(out)
    assert unfinished
    for path in unfinished:
        if not (path / "muxjax.json").exists():
            with pytest.raises(CheckpointError, match=r"neither config.json|incomplete"):
                open_checkpoint(path)
    # Converting again removes what is left, and nothing of other conversions.
    dest = out / unfinished[0].name.partition(".")[0]
    convert(open_checkpoint(source), dest)
    assert_complete(dest, source)
    assert leftovers(out) == unfinished[1:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_conversion_removes_its_files(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "muxjax", "convert", "demo:smollm2-135m", out / "dest"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not leftovers(out) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        errors = process.communicate(timeout=300)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []


def test_folder_of_a_running_conversion_is_kept(source: Path, tmp_path: Path) -> None:
    checkpoint = open_hf(source)
    with converting._destination(tmp_path / "dest") as other:
        convert(checkpoint, tmp_path / "dest")
        assert other.exists()
    assert_complete(tmp_path / "dest", source)


def test_second_of_two_conversions_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = orbax.save

    def save_later(folder: Path, *arguments: object) -> None:
        monkeypatch.undo()
        convert(open_hf(source), tmp_path / "dest")  # is faster
        save(folder, *arguments)

    monkeypatch.setattr(converting.orbax, "save", save_later)
    with pytest.raises(CheckpointError, match=r"cannot write .*dest: Directory not empty"):
        convert(open_hf(source), tmp_path / "dest")
    assert_complete(tmp_path / "dest", source)
    assert leftovers(tmp_path) == []


def test_source_that_changes_meanwhile_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = orbax.save

    def save_then_change(*arguments: object) -> None:
        save(*arguments)
        (source / "model.safetensors").write_bytes(b"other")

    monkeypatch.setattr(converting.orbax, "save", save_then_change)
    with pytest.raises(CheckpointError, match="changed since the model was opened"):
        convert(open_hf(source), tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_full_disk_is_one_line_and_leaves_no_files(source: Path, tmp_path: Path) -> None:
    done = run_muxjax("convert", source, tmp_path / "dest", file_bytes=20_000)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"muxjax: cannot write {tmp_path / 'dest'}: File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_too_little_space_is_found_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = converting.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: usage._replace(free=9_000))
    monkeypatch.setattr(converting.orbax, "save", None)
    with pytest.raises(CheckpointError, match=r"No space left on device: .* MB are needed"):
        convert(open_hf(source), tmp_path / "dest")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_read_only_folder_is_one_line(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    for dest in (folder / "dest", folder / "deep" / "dest"):
        done = run_muxjax("convert", source, dest)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"muxjax: cannot write {dest}: Permission denied\n"
    assert list(folder.iterdir()) == []


def test_incomplete_copy_is_refused(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    convert(open_hf(source), dest)
    sizes = json.loads((dest / "muxjax.json").read_text())["files"]
    assert {"tokenizer.json", "params/_METADATA"} <= sizes.keys()
    for name in sizes:
        content = (dest / name).read_bytes()
        (dest / name).write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=rf"incomplete: {name} has \d+ of \d+ bytes"):
            open_checkpoint(dest)
        (dest / name).unlink()
        with pytest.raises(CheckpointError, match=f"incomplete: {name} is missing"):
            open_checkpoint(dest)
        (dest / name).write_bytes(content)
    assert_complete(dest, source)


def test_interrupted_save_over_another_checkpoint_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old config must not describe the new weights."""
    case = golden.tiny("llama")
    orbax.save(tmp_path, case.config, case.params)

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax, "_complete", stop)
    with pytest.raises(KeyboardInterrupt):
        orbax.save(tmp_path, case.config, case.params)
    with pytest.raises(CheckpointError, match=r"incomplete, it has no muxjax.json"):
        open_checkpoint(tmp_path)


def test_digests_of_all_files_are_stored(source: Path, tmp_path: Path) -> None:
    convert(open_hf(source), tmp_path / "dest")
    digests = read_sums(tmp_path / "dest")
    files = {path for path in (tmp_path / "dest").rglob("*") if path.is_file()}
    assert digests.keys() == files - {tmp_path / "dest" / "SHA256SUMS"}
    assert all(digest.matches(path) for path, digest in digests.items())
