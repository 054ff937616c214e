"""Downloads from a local Hub: wrong bytes, races, kills, full and read-only disks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from muxjax.models.checkpoints.hf import save_hf
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from tests import golden
from tests.limited import ROOT, limited
from tests.models.hub_server import HubRepository, serve_hub

pytestmark = pytest.mark.faults

WEIGHTS = "model.safetensors"


class HubClient:
    """Runs processes with a Hub at `hub` and caches in `folder`."""

    def __init__(self, hub: HubRepository, folder: Path) -> None:
        self.hub = hub
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    @property
    def repository(self) -> Path:
        return self.folder / "hf" / "hub" / "models--org--tiny"

    def start(self, *arguments: object, file_bytes: int = 0) -> subprocess.Popen[str]:
        names = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")
        kept = {key: value for key, value in os.environ.items() if key not in names}
        process = subprocess.Popen(
            limited(*map(str, arguments), file_bytes=file_bytes),
            cwd=ROOT,
            env={
                **kept,
                "HF_ENDPOINT": self.hub.address,
                "HF_HOME": str(self.folder / "hf"),
                "PYTHONPATH": str(ROOT),
                "MUXJAX_CACHE": str(self.folder / "muxjax"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def start_fetch(self, file_bytes: int = 0) -> subprocess.Popen[str]:
        return self.start(Path(__file__).with_name("fetch_hub.py"), file_bytes=file_bytes)

    def fetch(self, file_bytes: int = 0) -> tuple[int, str]:
        """Downloads the model; returns the exit status and the messages."""
        return self.finish(self.start_fetch(file_bytes))

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        errors = process.communicate(timeout=300)[1]
        return process.returncode, errors

    def verify(self, source: object) -> tuple[int, str, str]:
        fleet = self.folder / "fleet.yaml"
        fleet.write_text(f"models: [{{name: tiny, source: {source}}}]\n")
        process = self.start("-m", "muxjax", "models", fleet, "--verify")
        output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    def wait_for_download(self) -> None:
        deadline = time.monotonic() + 300
        while WEIGHTS not in self.hub.downloads:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubClient]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    case = golden.tiny("llama")
    save_hf(tmp_path / "files", case.config, case.params, byte_tokenizer(256))
    files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    with serve_hub(HubRepository(files)) as hub:
        client = HubClient(hub, tmp_path)
        yield client
        for process in client.processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_wrong_bytes_are_refused_and_downloaded_again(client: HubClient, name: str) -> None:
    data = client.hub.files[name]
    client.hub.damaged[name] = data[:-2] + bytes([data[-2] ^ 1, data[-1]])
    message = f"muxjax: org/tiny: the digest of {name} differs from the Hub's; deleted, "
    for _ in range(2):
        assert client.fetch() == (1, f"{message}run again to download\n")
    client.hub.damaged.clear()
    assert client.fetch() == (0, "")
    assert client.hub.downloads.count(name) == 3


def test_damage_that_came_later_is_found(client: HubClient) -> None:
    assert client.fetch() == (0, "")
    blob = client.repository / "blobs" / client.hub.etag(WEIGHTS)
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (link,) = client.repository.rglob(f"snapshots/*/{WEIGHTS}")
    status, output, errors = client.verify("org/tiny")
    assert status == 1
    assert output.splitlines()[1].split() == ["tiny", str(len(client.hub.files)), "1", "damaged"]
    reason = "damaged, its digest differs from the stored one"
    message = f"muxjax: {link}: {reason}: delete {blob} and download it again"
    assert errors.splitlines()[1:] == [message]
    blob.unlink()
    status, _, errors = client.verify("org/tiny")
    assert status == 1
    assert "muxjax: org/tiny: missing: not downloaded, or not completely" in errors
    assert client.fetch() == (0, "")
    assert client.verify("org/tiny")[0] == 0


def test_digests_are_checked_once(client: HubClient) -> None:
    assert client.fetch() == (0, "")
    (record,) = (client.folder / "muxjax" / "hub").iterdir()
    assert record.read_text().split() == sorted(map(client.hub.etag, client.hub.files))
    state = record.stat()
    assert client.fetch() == (0, "")
    assert record.stat().st_mtime_ns == state.st_mtime_ns
    record.unlink()
    record.parent.rmdir()
    record.parent.parent.rmdir()
    record.parent.parent.mkdir(mode=0o555)
    assert client.fetch() == (0, "")


def test_racing_processes_download_once(client: HubClient) -> None:
    client.hub.hold_after = 1000
    processes = [client.start_fetch(), client.start_fetch()]
    client.wait_for_download()
    client.hub.release.set()
    assert [client.finish(process) for process in processes] == [(0, ""), (0, "")]
    assert client.hub.downloads.count(WEIGHTS) == 1
    assert client.verify("org/tiny")[0] == 0


def test_killed_download_starts_again(client: HubClient) -> None:
    client.hub.hold_after = 1000
    process = client.start_fetch()
    client.wait_for_download()
    process.kill()
    process.communicate(timeout=300)
    client.hub.hold_after = None
    assert client.fetch() == (0, "")
    assert client.verify("org/tiny")[0] == 0


def test_full_disk_is_one_line(client: HubClient) -> None:
    status, errors = client.fetch(file_bytes=20_000)
    assert status == 1
    assert errors == (
        "muxjax: org/tiny: not a local path, and cannot be downloaded from the Hub: "
        "File too large\n"
    )
    blobs = {path.name for path in (client.repository / "blobs").iterdir()}
    assert blobs <= {client.hub.etag(name) for name in client.hub.files}
    assert client.hub.etag(WEIGHTS) not in blobs


def test_read_only_cache_is_one_line(client: HubClient) -> None:
    (client.folder / "hf").mkdir(mode=0o555)
    status, errors = client.fetch()
    assert status == 1
    assert errors == (
        "muxjax: org/tiny: not a local path, and cannot be downloaded from the Hub: "
        "Permission denied\n"
    )


def test_folder_of_hf_download_is_verified(client: HubClient) -> None:
    folder = client.folder / "local"
    program = "import huggingface_hub, sys\n"
    program += "huggingface_hub.snapshot_download('org/tiny', local_dir=sys.argv[1])"
    environment = {**os.environ, "HF_ENDPOINT": client.hub.address, "HF_HOME": str(folder / "home")}
    subprocess.run(
        [sys.executable, "-c", program, folder],
        env=environment,
        check=True,
        timeout=300,
        capture_output=True,
    )
    status, output, _ = client.verify(folder)
    assert (status, output.splitlines()[1].split()[1:]) == (0, [str(len(client.hub.files)), "ok"])
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 1.0}))
    status, _, errors = client.verify(folder)
    assert status == 1
    assert f"{config}: damaged, " in errors
