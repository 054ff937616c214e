"""Digests of files, and `SHA256SUMS`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from muxjax.errors import CheckpointError
from muxjax.models.digests import Digest, read_sums, sha256_of, write_sums


def test_digests_match_only_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello\n")
    known = [
        # sha256sum and `git hash-object`
        Digest("sha256", "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"),
        Digest("git", "ce013625030ba8dba906f756967f9e9ca394464a"),
    ]
    assert all(digest.matches(path) for digest in known)
    path.write_bytes(b"hellO\n")
    assert not any(digest.matches(path) for digest in known)


def test_sums_are_read_as_written_and_by_sha256sum(tmp_path: Path) -> None:
    assert read_sums(tmp_path) == {}
    (tmp_path / "deep").mkdir()
    paths = [tmp_path / "deep" / "a b", tmp_path / "c"]
    for path in paths:
        path.write_text(path.name)
    write_sums(tmp_path, {str(path.relative_to(tmp_path)): sha256_of(path) for path in paths})
    assert read_sums(tmp_path) == {path: Digest("sha256", sha256_of(path)) for path in paths}
    program = shutil.which("sha256sum")
    assert program is not None
    command = [program, "--check", "--strict", "SHA256SUMS"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_other_formats_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64} *./file\nMD5 (x) = 1\n")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS:2: not a line of sha256sum"):
        read_sums(tmp_path)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64} *./file\n{'0' * 64}  SHA256SUMS\n")
    assert list(read_sums(tmp_path)) == [tmp_path / "file"]
    (tmp_path / "SHA256SUMS").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="SHA256SUMS: cannot be read"):
        read_sums(tmp_path)
