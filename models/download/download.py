"""Resumable downloads: data is kept in a `.part` file and verified by its SHA-256 at the end."""

from __future__ import annotations

import base64
import contextlib
import http.client
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from muxjax.errors import DownloadError
from muxjax.models.digests import sha256_of
from muxjax.models.disk_errors import check_space, write_failure
from muxjax.models.download import network
from muxjax.models.download.network import NetworkDown

_ATTEMPTS = 4
_TIMEOUT_S = 60.0
_CHUNK = 1 << 20

Report = Callable[[int], None]
"""Callback for progress: receives the number of bytes downloaded so far."""


@dataclass(frozen=True)
class Location:
    """The URL of a file (http, https or file), and an optional bundle of additional CAs."""

    url: str
    ca_file: str | None = None

    @property
    def redacted_url(self) -> str:
        """The URL without user name and password."""
        parts = urllib.parse.urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def download(location: Location, target: Path, sha256: str, report: Report) -> None:
    """Downloads a file to `target`, which appears only when it is complete and verified.

    An interrupted download is resumed from `target.part` if the server supports it. After a
    connection error, the download is resumed up to three times.

    Raises:
      DownloadError: the download failed (its data is kept for the next call), the file cannot be
        written, or the checksum differs (the data is deleted).
    """
    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _download_all(location, part, sha256, report)
        actual = sha256_of(part)
        if actual != sha256:
            part.unlink()
            raise DownloadError(
                f"{location.redacted_url}: SHA-256 is {actual}, expected {sha256}; deleted"
            )
        part.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise DownloadError(f"cannot write {target}: {write_failure(error)}") from error


def _download_all(location: Location, part: Path, sha256: str, report: Report) -> None:
    """Downloads to `part` in several attempts.

    Raises:
      DownloadError: all attempts failed.
      OSError: `part` cannot be written.
    """
    for attempt in range(_ATTEMPTS):
        try:
            _download_part(location, part, report)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in (408, 416, 429):
                raise DownloadError(
                    f"{location.redacted_url}: HTTP {error.code} {error.reason}"
                ) from error
            if error.code == 416:  # the part is longer than the file, or complete
                if sha256_of(part) == sha256:
                    break
                part.unlink()
            failure: Exception = error
        except _DiskError as error:
            raise error.reason from error
        except (OSError, http.client.HTTPException) as error:
            failure = error
        if attempt == _ATTEMPTS - 1:
            kept = f"; {_size(part)} bytes are kept, run again to resume"
            reason = network.failure_of(failure)
            if reason is not None:
                raise NetworkDown(location.redacted_url, reason, note=kept) from failure
            raise DownloadError(f"{location.redacted_url}: {failure}{kept}") from failure
        time.sleep(2.0**attempt)


class _DiskError(Exception):
    """A local file that cannot be written; repeating the download would not help."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download_part(location: Location, part: Path, report: Report) -> None:
    size = _size(part)
    headers = {"Range": f"bytes={size}-"} if size else {}
    with contextlib.closing(open_url(location, headers)) as response:
        resumed = response.status == 206 and _range_start(response) == size
        length = response.headers.get("Content-Length")
        done = size if resumed else 0
        total = done + int(length) if length is not None else None
        with _disk_errors():
            file = part.open("ab" if resumed else "wb", buffering=0)
        with file:
            report(done)
            with _disk_errors():
                check_space(part.parent, (total or done) - done)
            while chunk := response.read(_CHUNK):
                with _disk_errors():
                    _write_all(file, chunk)
                done += len(chunk)
                report(done)
    if total is not None and done < total:
        raise ConnectionError(f"the connection ended after {done} of {total} bytes")


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Distinguishes errors of the disk from errors of the network, which are OSErrors too."""
    try:
        yield
    except OSError as error:
        raise _DiskError(error) from error


def _write_all(file: RawIOBase, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


def _range_start(response: http.client.HTTPResponse) -> int | None:
    unit, _, byte_range = response.headers.get("Content-Range", "").partition(" ")
    start = byte_range.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() else None


def open_url(location: Location, headers: Mapping[str, str] | None = None) -> Any:
    """Opens a URL with its credentials and CAs.

    Returns an HTTPResponse, or its equivalent for files.

    Raises:
      OSError: the URL cannot be opened; HTTP errors are `urllib.error.HTTPError`.
      DownloadError: the scheme is not http, https or file.
    """
    parts = urllib.parse.urlsplit(location.url)
    credentials, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host, fragment="").geturl())
    request.add_header("Accept-Encoding", "identity")
    request.add_header("User-Agent", "muxjax")
    for name, value in (headers or {}).items():
        request.add_header(name, value)
    if credentials:
        token = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    context = None
    if parts.scheme == "https":
        context = ssl.create_default_context()
        if location.ca_file:
            context.load_verify_locations(location.ca_file)
    elif parts.scheme not in ("http", "file"):
        raise DownloadError(
            f"{location.redacted_url}: cannot download from {parts.scheme!r} addresses"
        )
    return urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context)
