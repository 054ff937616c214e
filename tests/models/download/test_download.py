"""Downloads that are interrupted, resume, or deliver the wrong file."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from muxjax.errors import DownloadError
from muxjax.models.digests import sha256_of
from muxjax.models.download import download as module
from muxjax.models.download.download import Location, download
from tests.models.file_server import Served, serve

DATA = random.Random(0).randbytes(100_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Served]:
    with serve(Served({"/file": DATA})) as served:
        yield served


def fetch(server: Served, target: Path, sha256: str = SHA256) -> list[int]:
    progress: list[int] = []
    download(Location(server.address + "/file"), target, sha256, progress.append)
    return progress


def test_file_is_downloaded(server: Served, tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    progress = fetch(server, target)
    assert target.read_bytes() == DATA
    assert sha256_of(target) == SHA256
    assert progress[0] == 0
    assert progress[-1] == len(DATA)
    assert list(target.parent.iterdir()) == [target]


def test_part_is_resumed(server: Served, tmp_path: Path) -> None:
    target = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(DATA[:30_000])
    progress = fetch(server, target)
    assert target.read_bytes() == DATA
    assert server.requested_ranges == ["bytes=30000-"]
    assert progress[0] == 30_000


def test_download_restarts_if_the_server_has_no_ranges(server: Served, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "file.part").write_bytes(b"x" * 30_000)
    assert fetch(server, tmp_path / "file")[0] == 0
    assert (tmp_path / "file").read_bytes() == DATA


def test_broken_connection_is_resumed(server: Served, tmp_path: Path) -> None:
    server.break_after = [10_000, 20_000]
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert server.requested_ranges == ["", "bytes=10000-", "bytes=30000-"]


def test_busy_server_is_retried(server: Served, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


def test_part_is_kept_after_four_attempts(server: Served, tmp_path: Path) -> None:
    server.break_after = [1000] * 4
    with pytest.raises(DownloadError, match="4000 bytes are kept, run again to resume"):
        fetch(server, tmp_path / "file")
    assert (tmp_path / "file.part").read_bytes() == DATA[:4000]
    fetch(server, tmp_path / "file")
    assert server.requested_ranges[-1] == "bytes=4000-"
    assert (tmp_path / "file").read_bytes() == DATA


def test_complete_part_is_used(server: Served, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(DATA)
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


def test_part_that_is_too_long_is_downloaded_again(server: Served, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(DATA + b"more")
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


def test_wrong_checksum_deletes_the_file(server: Served, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"SHA-256 is .*, expected 000; deleted"):
        fetch(server, tmp_path / "file", "000")
    assert list(tmp_path.iterdir()) == []


def test_missing_file_is_not_retried(server: Served, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="/none: HTTP 404"):
        download(Location(server.address + "/none"), tmp_path / "f", SHA256, lambda done: None)
    assert len(server.requested_ranges) == 1


def test_credentials_are_sent_and_redacted(server: Served, tmp_path: Path) -> None:
    address = server.address.replace("//", "//user:p%40ss@")
    download(Location(address + "/file"), tmp_path / "file", SHA256, lambda done: None)
    assert server.authorizations == ["Basic dXNlcjpwQHNz"]
    assert Location(address + "/file").redacted_url == server.address + "/file"
    server.statuses = [403]
    with pytest.raises(DownloadError) as refused:
        download(Location(address + "/file"), tmp_path / "g", SHA256, lambda done: None)
    assert "p%40ss" not in str(refused.value)


def test_file_url(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    (tmp_path / "file.part").write_bytes(b"old")
    download(Location(source.as_uri()), tmp_path / "file", SHA256, lambda done: None)
    assert (tmp_path / "file").read_bytes() == DATA


def test_unknown_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="cannot download from 'ftp' addresses"):
        download(Location("ftp://127.0.0.1/f"), tmp_path / "f", SHA256, lambda done: None)
