"""Digests of files, and the file `SHA256SUMS` that stores them beside the files.

`SHA256SUMS` has the format of `sha256sum`: `sha256sum --check SHA256SUMS` reads it too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from muxjax.errors import CheckpointError

SUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"(?P<value>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Digest:
    """The digest of a file.

    Attributes:
      algorithm: "sha256" of the contents, or "git": the SHA-1 of Git's blob.
      value: in lower-case hexadecimal.
    """

    algorithm: Literal["sha256", "git"]
    value: str

    def matches(self, path: Path) -> bool:
        """Whether a file has this digest.

        Raises:
          OSError: the file cannot be read.
        """
        actual = sha256_of(path) if self.algorithm == "sha256" else _git_blob(path)
        return actual == self.value


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_blob(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Writes `SHA256SUMS`.

    Args:
      folder: of the files.
      sums: SHA-256 in hexadecimal, by path relative to the folder.
    """
    lines = [f"{value}  {name}\n" for name, value in sorted(sums.items())]
    (folder / SUMS_FILE).write_text("".join(lines), "utf-8")


def read_sums(folder: Path) -> dict[Path, Digest]:
    """The digests in a folder's `SHA256SUMS`, by path; empty without such a file.

    Raises:
      CheckpointError: the file cannot be read, or a line has another format.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        return {}
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    digests = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(f"{path}:{number}: not a line of sha256sum")
        digests[folder / match["name"]] = Digest("sha256", match["value"].lower())
    digests.pop(path, None)  # `sha256sum *` lists its own output
    return digests
