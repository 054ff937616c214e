"""Checks the files of a model against the digests that are stored beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from muxjax.errors import CheckpointError, DownloadError
from muxjax.models.checkpoints.sources import is_hub_id
from muxjax.models.digests import Digest, read_sums
from muxjax.models.download.demo import demo_digests
from muxjax.models.download.hub import fetch_from_hub, hub_digests

_REASONS = {
    "damaged": "damaged, its digest differs from the stored one",
    "missing": "missing",
    "unreadable": "cannot be read",
}


@dataclass(frozen=True)
class FileCheck:
    """The result for one file.

    Attributes:
      path: of the file; the model's source, if that does not exist.
      state: "ok", or what is wrong.
      remedy: what to do unless it is ok.
    """

    path: str
    state: Literal["ok", "damaged", "missing", "unreadable"]
    remedy: str

    @property
    def message(self) -> str:
        """The file, what is wrong and what to do, in one line."""
        return f"{self.path}: {_REASONS[self.state]}: {self.remedy}"


@dataclass(frozen=True)
class StoredDigests:
    """The digests of a source's files.

    Attributes:
      digests: by path; empty if none are stored.
      remedy: what to do about a damaged file; `{path}` stands for the file that has the contents.
    """

    digests: dict[Path, Digest]
    remedy: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the files that are there."""
        return sum(path.stat().st_size for path in self.digests if path.is_file())

    def check(self, on_checked: Callable[[int], None]) -> list[FileCheck]:
        """Reads and checks all files.

        Args:
          on_checked: called with the bytes of each file that was read.
        """
        return [self._check(path, digest, on_checked) for path, digest in self.digests.items()]

    def _check(self, path: Path, digest: Digest, on_checked: Callable[[int], None]) -> FileCheck:
        remedy, name = self.remedy.format(path=path.resolve()), str(path)
        if not path.is_file():
            return FileCheck(name, "missing", remedy)
        try:
            matches = digest.matches(path)
            on_checked(path.stat().st_size)
        except OSError:
            return FileCheck(name, "unreadable", remedy)
        return FileCheck(name, "ok" if matches else "damaged", remedy)


def find_digests(source: str) -> StoredDigests:
    """Finds the digests of a model's files. Downloads nothing.

    - A demo model: part of MuxJAX.
    - A Hub id, or a folder that `hf download` wrote: published by the Hub.
    - Any other folder, such as one that `muxjax convert` wrote: `SHA256SUMS` in the folder.

    Args:
      source: as in a fleet file.

    Raises:
      CheckpointError: no such file or folder, or `SHA256SUMS` cannot be read.
      DownloadError: an unknown demo model, or a Hub id that was not downloaded.
    """
    if source.startswith("config:"):
        return StoredDigests({})
    if source.startswith("demo:"):
        name = source.removeprefix("demo:")
        return StoredDigests(demo_digests(name), f"run `muxjax fetch {name}`")
    path = Path(source).expanduser()
    if not path.exists() and is_hub_id(source):
        try:
            path = fetch_from_hub(source, cached=True)
        except DownloadError as error:
            raise DownloadError(
                "not downloaded, or not completely; the next start downloads it"
            ) from error
    if not path.exists():
        raise CheckpointError("no such file or folder")
    folder = path if path.is_dir() else path.parent
    sums, published = read_sums(folder), hub_digests(folder)
    digests = published | sums
    if path.is_file():
        digests = {file: digest for file, digest in digests.items() if file == path}
    if (folder / "muxjax.json").is_file():
        return StoredDigests(digests, "convert the model again, or copy the file again")
    if published and not sums:
        return StoredDigests(digests, "delete {path} and download it again")
    return StoredDigests(digests, "copy or download the file again")
