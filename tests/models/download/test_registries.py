"""Locations from the real pip with a local index, and from a fake npm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from muxjax.errors import DownloadError
from muxjax.models.download import registries
from muxjax.models.download.download import Location
from tests.models.file_server import Served, serve
from tests.models.packages import NAME, VERSION, WHEEL, build_wheel, index_page


@pytest.fixture
def configure_pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets pip's options by environment variables and removes all others."""

    def configure(**options: str) -> None:
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX"):
            monkeypatch.delenv(f"PIP_{name}", raising=False)
        for name, value in options.items():
            monkeypatch.setenv(f"PIP_{name.upper()}", value)

    return configure


def test_wheel_in_a_local_folder_is_located(
    configure_pip: Callable[..., None], tmp_path: Path
) -> None:
    path = build_wheel(tmp_path, {"data.bin": b"x"})
    configure_pip(no_index="1", find_links=str(tmp_path))
    location = registries.locate_wheel(NAME, VERSION)
    assert location is not None
    assert location.url == path.as_uri()
    assert registries.locate_wheel(NAME, "9.9") is None


def test_wheel_on_an_index_is_located_without_a_download(
    configure_pip: Callable[..., None], tmp_path: Path
) -> None:
    wheel = build_wheel(tmp_path, {"data.bin": b"x"}).read_bytes()
    link = f"/files/{WHEEL}#sha256=00"
    pages = {f"/simple/{NAME}/": index_page(link), f"/files/{WHEEL}": wheel}
    with serve(Served(pages)) as server:
        configure_pip(index_url=f"{server.address}/simple/")
        location = registries.locate_wheel(NAME, VERSION)
        assert location is not None
        assert location.url == f"{server.address}/files/{WHEEL}"
        assert len(server.requested_ranges) == 1  # the index page only


def test_pip_downloads_a_wheel(configure_pip: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "out").mkdir()
    path = build_wheel(tmp_path / "links", {"data.bin": b"x"})
    configure_pip(no_index="1", find_links=str(path.parent))
    fetched = registries.pip_download(NAME, VERSION, tmp_path / "out")
    assert fetched.read_bytes() == path.read_bytes()
    with pytest.raises(DownloadError, match=r"pip could not download muxjax-test-data==9.9: "):
        registries.pip_download(NAME, "9.9", tmp_path / "none")


def test_wheel_on_an_index_with_json_pages_and_a_password_is_located(
    configure_pip: Callable[..., None], tmp_path: Path
) -> None:
    page = json.dumps({"files": [{"filename": WHEEL, "url": f"../../files/{WHEEL}"}]}).encode()
    with serve(Served({f"/simple/{NAME}/": page})) as server:
        address = server.address.replace("http://", "http://user:secret@")
        configure_pip(index_url=f"{address}/simple/")
        location = registries.locate_wheel(NAME, VERSION)
        assert location is not None
        assert location.url == f"{address}/files/{WHEEL}"
        assert location.redacted_url == f"{server.address}/files/{WHEEL}"


def test_index_without_the_wheel_gives_no_location(configure_pip: Callable[..., None]) -> None:
    with serve(Served({f"/simple/{NAME}/": index_page("other-1.0-py3-none-any.whl")})) as server:
        configure_pip(index_url=f"{server.address}/simple/")
        assert registries.locate_wheel(NAME, VERSION) is None
    configure_pip(index_url=f"{server.address}/simple/")  # the server is closed
    assert registries.locate_wheel(NAME, VERSION) is None


def test_missing_pip_error_suggests_ensurepip(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "No module named pip")

    monkeypatch.setattr(registries.subprocess, "run", run)
    with pytest.raises(DownloadError, match="python -m ensurepip"):
        registries.locate_wheel(NAME, VERSION)


@pytest.fixture
def fake_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs an `npm` on the path that runs the given Python code with `arguments`."""

    def install(body: str) -> None:
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{sys.executable}\nimport sys\narguments = sys.argv[1:]\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))

    return install


def test_tarball_is_located(fake_npm: Callable[[str], None], tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text("")
    fake_npm(
        "if arguments == ['config', 'get', 'cafile']:\n"
        f"    print({str(authority)!r})\n"
        "elif arguments[:4] == ['view', 'pkg@1.0', 'dist.tarball', '--json']:\n"
        "    print('\"http://127.0.0.1/pkg.tgz\"')\n"
        "else:\n"
        "    sys.exit(1)"
    )
    assert registries.locate_tarball("pkg", "1.0") == Location(
        "http://127.0.0.1/pkg.tgz", str(authority)
    )
    with pytest.raises(DownloadError, match=r"npm cannot find pkg@2.0"):
        registries.locate_tarball("pkg", "2.0")


def test_npm_error_is_reported(fake_npm: Callable[[str], None]) -> None:
    fake_npm("print('null')\nprint('E404 not found', file=sys.stderr)")
    with pytest.raises(DownloadError, match=r"npm cannot find pkg@1.0: E404 not found"):
        registries.locate_tarball("pkg", "1.0")


def test_missing_npm_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DownloadError, match=r"npm is needed to find pkg@1.0, and is not installed"):
        registries.locate_tarball("pkg", "1.0")
