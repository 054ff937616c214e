"""The folder for downloads and compiled programs on this machine."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from muxjax.errors import MuxError


class CacheUnavailable(MuxError, OSError):
    """There is no cache folder: neither a setting nor a home folder names it."""


def cache_folder() -> Path:
    """Returns `$MUXJAX_CACHE`, or `muxjax` in the user's cache folder; it need not exist.

    Raises:
      CacheUnavailable: the user has no home folder, and no variable names another one.
    """
    chosen = os.environ.get("MUXJAX_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        user_cache = os.environ.get("XDG_CACHE_HOME")
        if user_cache:
            return Path(user_cache) / "muxjax"
        # An empty HOME would be the root folder.
        home = Path.home() if os.environ.get("HOME", "/") else Path(f"~{_user()}").expanduser()
    except RuntimeError as error:
        raise CacheUnavailable(
            "no home folder for the cache; set MUXJAX_CACHE to a folder that may be written"
        ) from error
    return home / ".cache" / "muxjax"


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError as error:
        raise RuntimeError("the user has no name") from error


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file as a whole: readers see the old contents or the new ones.

    Raises:
      OSError: the file cannot be written; it is unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
