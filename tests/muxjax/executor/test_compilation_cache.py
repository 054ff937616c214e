"""The compilation cache with damaged entries and with folders that cannot be used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from muxjax.executor.compilation_cache import ProgramFiles

ROOT = Path(__file__).parents[3]
ENTRY = zlib.compress(bytes(range(256)) * 40)
pytestmark = pytest.mark.faults


def flip_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one bit": flip_bit,
    "end": lambda data: data[:-1] + b"\0",
    "garbage": lambda data: b"\xff" * len(data),
}


def test_entries_are_stored_and_jax_can_read_them(tmp_path: Path) -> None:
    files = ProgramFiles(tmp_path / "new" / "folder")
    assert files.get("key") is None
    files.put("key", ENTRY)
    assert files.get("key") == ENTRY
    (path,) = files.folder.iterdir()
    assert path.name == "key-cache"
    assert zlib.decompress(path.read_bytes()) == zlib.decompress(ENTRY)


def test_an_entry_of_jax_is_read(tmp_path: Path) -> None:
    (tmp_path / "key-cache").write_bytes(ENTRY)
    assert ProgramFiles(tmp_path).get("key") == ENTRY


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("by_jax", [False, True])
def test_damaged_entry_is_replaced(
    tmp_path: Path, damage: str, by_jax: bool, caplog: pytest.LogCaptureFixture
) -> None:
    files = ProgramFiles(tmp_path)
    files.put("key", ENTRY)
    path = tmp_path / "key-cache"
    path.write_bytes(DAMAGE[damage](ENTRY if by_jax else path.read_bytes()))
    assert files.get("key") is None
    assert files.get("key") is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("stored programs are damaged, and are compiled again: ")
    files.put("key", ENTRY)
    assert files.get("key") == ENTRY


def test_entry_that_jax_could_not_use_is_replaced(tmp_path: Path) -> None:
    files = ProgramFiles(tmp_path)
    files.put("key", b"of another machine")
    files.put("key", ENTRY)
    assert files.get("key") == ENTRY


def test_unreadable_entry_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "key-cache").mkdir()
    files = ProgramFiles(tmp_path)
    for _ in range(2):
        assert files.get("key") is None
        files.put("key", ENTRY)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert all("Is a directory" in message for message in caplog.messages)
    assert [path.name for path in tmp_path.iterdir()] == ["key-cache"]


PROGRAM = """
import pwd, resource, sys, warnings
warnings.simplefilter("always")
def no_entry(number): raise KeyError(number)
if "no_user" in sys.argv: pwd.getpwuid = no_entry
if "full" in sys.argv: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
import jax
from muxjax.executor.compilation_cache import enable_compilation_cache
for _ in range(2):
    enable_compilation_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
for scale in (2, 3, 5):
    print(jax.jit(lambda x: x * scale + 1)(7))
"""


def compile_programs(*arguments: str, **variables: str) -> list[str]:
    """Compiles programs in another process; returns the lines of its log and its errors."""
    removed = ("HOME", "XDG_CACHE_HOME", "MUXJAX_CACHE", "JAX_COMPILATION_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in removed}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env={**environment, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout) == (0, "15\n22\n36\n"), result.stderr
    return result.stderr.splitlines()


@pytest.mark.parametrize("variable", ["MUXJAX_CACHE", "JAX_COMPILATION_CACHE_DIR"])
def test_jax_replaces_damaged_entries(tmp_path: Path, variable: str) -> None:
    assert compile_programs(**{variable: str(tmp_path)}) == []
    entries = {path: path.read_bytes() for path in tmp_path.rglob("*-cache")}
    assert len(entries) >= 3
    for (path, data), damage in zip(
        entries.items(), ("empty", "truncated", "one bit"), strict=False
    ):
        path.write_bytes(DAMAGE[damage](data))
    (line,) = compile_programs(**{variable: str(tmp_path)})
    assert "stored programs are damaged, and are compiled again" in line
    assert compile_programs(**{variable: str(tmp_path)}) == []
    (folder,) = {path.parent for path in entries}
    assert {path for path in folder.iterdir() if path.is_file()} == set(entries)
    assert all(ProgramFiles(folder).get(path.name.removesuffix("-cache")) for path in entries)


@pytest.mark.parametrize("variable", ["MUXJAX_CACHE", "JAX_COMPILATION_CACHE_DIR"])
@pytest.mark.parametrize("kind", ["absent", "file", "full"])
def test_folder_that_cannot_be_used_is_one_line(tmp_path: Path, variable: str, kind: str) -> None:
    folder = tmp_path / "folder"
    if kind == "file":
        folder.write_text("")
    arguments = (kind,) if kind == "full" else ()
    path = "/proc/none/cache" if kind == "absent" else str(folder)
    lines = compile_programs(*arguments, **{variable: path})
    assert lines
    (line,) = [line for line in lines if "not stored" in line]
    assert "compiled programs are not stored for the next start: [Errno " in line
    assert [other for other in lines if "not all stored programs can be read" not in other] == [
        line
    ]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == (
        [folder] if kind == "file" else []
    )


@pytest.mark.parametrize("variables", [{}, {"HOME": ""}, {"MUXJAX_CACHE": "~none/cache"}])
def test_no_home_folder_is_one_line(variables: dict[str, str]) -> None:
    (line,) = compile_programs("no_user", **variables)
    assert line == (
        "compiled programs are not stored for the next start: no home folder for the cache; set "
        "MUXJAX_CACHE to a folder that may be written"
    )
