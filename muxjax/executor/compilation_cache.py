"""JAX's persistent compilation cache, with files that are checked, and replaced when damaged.

JAX writes entries in place and never replaces one, so that an entry that a full disk or an ended
process left incomplete would cost its compilation at every start. A folder that cannot be used
costs compilations but no error. Each kind of fault is reported once per process.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from pathlib import Path

import jax
from jax._src import compilation_cache as jax_cache

from muxjax.cache import CacheUnavailable, cache_folder, replace_file

log = logging.getLogger("muxjax")

_SUFFIX = "-cache"
"""End of the names of JAX's entries, so that JAX can read the files too."""
_HEADER = struct.pack("<II", 0x184D2A5D, hashlib.sha256().digest_size)
"""Header of a skippable frame of Zstandard, which holds the digest of the entry before it.

Zstandard skips the frame and zlib ignores it, so that JAX itself can read the entry.
"""
_FOOTER_BYTES = len(_HEADER) + hashlib.sha256().digest_size


class ProgramFiles:
    """The entries of the compilation cache, in one folder; has the methods that JAX calls.

    Args:
      folder: need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reported: set[str] = set()

    def get(self, key: str) -> bytes | None:
        """Returns an entry; None if it is missing, damaged or cannot be read."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._report("not all stored programs can be read, and those are compiled", error)
            return None
        entry = _checked_entry(stored)
        if entry is None:
            self._report(f"stored programs are damaged, and are compiled again: {path}")
        return entry

    def put(self, key: str, value: bytes) -> None:
        """Stores an entry. Replaces an older one, which JAX could not use if it compiles again."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._path(key), value + _HEADER + hashlib.sha256(value).digest())
        except OSError as error:
            self._report("compiled programs are not stored for the next start", error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _report(self, event: str, error: OSError | None = None) -> None:
        kind = event.partition(":")[0]
        if kind not in self._reported:
            self._reported.add(kind)
            log.warning("%s", event if error is None else f"{event}: {error}")


def enable_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache, in the user's cache folder.

    A folder that the user has configured (`JAX_COMPILATION_CACHE_DIR`) is used instead. With a
    limit of its size or on a remote file system, it is left to JAX.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = cache_folder() / "xla" / f"jax-{jax.__version__}-{jax.default_backend()}"
        except CacheUnavailable as error:
            log.warning("compiled programs are not stored for the next start: %s", error)
            jax.config.update("jax_enable_compilation_cache", False)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    configured = jax.config.jax_compilation_cache_dir
    left_to_jax = (
        not configured
        or "://" in configured
        or jax.config.jax_compilation_cache_max_size != -1
        or jax.config.jax_compilation_cache_check_contents
    )
    current = jax_cache._cache
    if left_to_jax or (
        isinstance(current, ProgramFiles) and current.folder == Path(str(configured))
    ):
        return
    # JAX has no public way to supply a cache.
    jax_cache._cache = ProgramFiles(Path(str(configured)))  # type: ignore[assignment]


def _checked_entry(stored: bytes) -> bytes | None:
    """The entry without its digest; None if it is damaged."""
    entry, footer = stored[:-_FOOTER_BYTES], stored[-_FOOTER_BYTES:]
    if footer.startswith(_HEADER):
        return entry if footer.endswith(hashlib.sha256(entry).digest()) else None
    try:  # an entry that JAX wrote; its compression detects most damage
        jax_cache.decompress_executable(stored)
    except Exception:  # noqa: BLE001 - its type depends on the compression
        return None
    return stored
