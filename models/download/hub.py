"""Checkpoints from the Hugging Face Hub.

`huggingface_hub` checks the sizes of files. Their digests are checked here, once per file: the name
of a cached file is the digest that the Hub published, and a record in MuxJAX's cache lists the
files that were checked.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx2
import huggingface_hub
import huggingface_hub.errors
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

from muxjax.cache import cache_folder
from muxjax.errors import DownloadError
from muxjax.models.digests import Digest
from muxjax.models.disk_errors import write_failure
from muxjax.models.download import network
from muxjax.models.download.network import NetworkDown

_FILES = ("*.json", "*.safetensors", "*.jinja")
_LOCAL_METADATA = Path(".cache") / "huggingface" / "download"


def fetch_from_hub(name: str, *, progress: bool = True, cached: bool = False) -> Path:
    """Downloads a repository's config, tokenizer and safetensors files; returns their folder.

    `huggingface_hub` downloads and caches the files. Its environment variables (`HF_HOME`,
    `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`) apply.

    Args:
      name: `org/name`, optionally followed by `@revision`.
      progress: show progress bars.
      cached: use the cached files only; do not download, and do not check digests.

    Raises:
      DownloadError: the repository does not exist, access is denied, there is no network and no
        cached copy, or a file has another digest than on the Hub (it is deleted).
    """
    repository, _, revision = name.partition("@")
    try:
        with _quiet(progress):
            folder = huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(_FILES),
                local_files_only=cached,
            )
    except (
        huggingface_hub.errors.HfHubHTTPError,
        httpx2.HTTPError,
        httpx2.InvalidURL,
        OSError,
        ValueError,
    ) as error:
        reason = network.failure_of(error)
        if reason is not None:
            raise NetworkDown(f"{name} from the Hub (it is no local path)", reason) from error
        text = " ".join(write_failure(error).split())
        raise DownloadError(
            f"{name}: not a local path, and cannot be downloaded from the Hub: {text}"
        ) from error
    if not cached:
        _check_new_files(name, Path(folder))
    return Path(folder)


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Hides warnings that precede an error about the same problem, and progress bars if wanted."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    if not progress:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Not enough free disk space", UserWarning)
            yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if not progress:
            enable_progress_bars()


def hub_digests(folder: Path) -> dict[Path, Digest]:
    """The digests that the Hub published for the files of a folder, by path.

    Knows two kinds of folders: snapshots in the cache, whose files are links to files named by
    their digests, and folders that `hf download --local-dir` wrote.
    """
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink()):
        digest = _parse_etag(Path(os.readlink(path)).name)
        if digest is not None:
            digests[path] = digest
    metadata = folder / _LOCAL_METADATA
    for file in sorted(metadata.rglob("*.metadata")):
        with contextlib.suppress(OSError, UnicodeDecodeError, IndexError):
            digest = _parse_etag(file.read_text("utf-8").splitlines()[1])  # after the commit
            if digest is not None:
                digests[folder / file.relative_to(metadata).with_suffix("")] = digest
    return digests


def _parse_etag(etag: str) -> Digest | None:
    """The digest in an ETag: SHA-256 of a file in Git LFS, the blob id of another file."""
    if re.fullmatch("[0-9a-f]{64}", etag):
        return Digest("sha256", etag)
    if re.fullmatch("[0-9a-f]{40}", etag):
        return Digest("git", etag)
    return None


def _check_new_files(name: str, folder: Path) -> None:
    """Checks the digests of files that were not checked before; deletes files that are damaged.

    Raises:
      DownloadError: a file is damaged.
    """
    digests = {
        path: digest
        for path, digest in hub_digests(folder).items()
        if any(path.match(pattern) for pattern in _FILES)
    }
    values = {digest.value for digest in digests.values()}
    record = cache_folder() / "hub" / f"{folder.parents[1].name}.checked"
    checked = _read_record(record)
    if values <= checked:
        return
    damaged = []
    try:
        for path, digest in digests.items():
            if digest.value not in checked and not digest.matches(path):
                damaged.append(path.name)
                (path.parent / os.readlink(path)).unlink()
                path.unlink()
    except OSError as error:
        raise DownloadError(f"{error.filename or folder}: {write_failure(error)}") from error
    if damaged:
        raise DownloadError(
            f"{name}: the digest of {', '.join(damaged)} differs from the Hub's; deleted, "
            "run again to download"
        )
    with contextlib.suppress(OSError):  # not recorded: the files are checked again next time
        record.parent.mkdir(parents=True, exist_ok=True)
        unfinished = record.with_name(f"{record.name}.{os.getpid()}")
        unfinished.write_text("".join(f"{value}\n" for value in sorted(checked | values)))
        unfinished.replace(record)


def _read_record(path: Path) -> set[str]:
    try:
        return set(path.read_text().split())
    except (OSError, UnicodeDecodeError):
        return set()
