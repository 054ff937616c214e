"""The compiled library of the CPU kernels: compiled once, stored in the cache folder, and checked.

A file is loaded only if its size and digest, which are parts of its name, and its symbols are
right: a truncated library ends the process with SIGBUS when it is used. Anything else is compiled
again. Compilation does not need the processor that runs the kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax

from muxjax.cache import cache_folder, replace_file

log = logging.getLogger("muxjax")

FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni", "fma")
"""CPU features that the kernels need, by their names in /proc/cpuinfo."""
FEATURE_FLAGS = tuple(f"-m{feature.replace('_', '')}" for feature in FEATURES)
COMPILERS = ("c++", "g++", "clang++")
SYMBOLS = (
    "muxjax_product_f32",
    "muxjax_product_bf16",
    "muxjax_product_int8",
    "muxjax_rms_norm",
    "muxjax_heads",
    "muxjax_paged_attention",
)
"""The kernels' functions, which are also their names in XLA."""
SOURCES = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w")
_COMPILE_SECONDS = 60.0
"""Bound of all runs of the compiler together."""
_NAME = re.compile(r"kernels-[0-9a-f]+-(\d+)-([0-9a-f]{32})\.so")


class KernelsNotCompiled(Exception):
    """The compiler failed, did not finish, or made a library that cannot be loaded."""


def find_compiler() -> str | None:
    """The path of the C++ compiler, or None."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def load_library(compiler: str) -> ctypes.CDLL:
    """Loads the library from the cache folder, or compiles it and stores it there.

    A stored file that is damaged is replaced. If it cannot be stored, it is compiled at each start.

    Raises:
      KernelsNotCompiled: there is no library; the message is one line.
    """
    deadline = time.monotonic() + _COMPILE_SECONDS
    key = _cache_key(_run(compiler, ["--version"], deadline))
    try:
        folder: Path | None = cache_folder() / "native"
    except OSError:
        folder = None
    library = None if folder is None else _load_stored(folder, key)
    return library or _compile_and_load(compiler, deadline, folder, key)


def damage_of(path: Path) -> str | None:
    """What is wrong with a stored library, whose name has its size and digest; None if nothing is.

    Raises:
      OSError: the file cannot be read.
    """
    data = path.read_bytes()
    name = _NAME.fullmatch(path.name)
    if not data:
        return "it is empty"
    if name is None or len(data) != int(name[1]):
        return f"it has {len(data)} bytes instead of {'?' if name is None else name[1]}"
    if _digest_of(data) != name[2]:
        return "its contents have changed"
    return _missing_symbol(data)


def _load_stored(folder: Path, key: str) -> ctypes.CDLL | None:
    """Loads a library that is intact and removes those that are not."""
    for path in sorted(folder.glob(f"kernels-{key}-*.so")):
        try:
            problem = damage_of(path)
            if problem is None:
                return _open(path)
        except (OSError, KernelsNotCompiled) as error:
            problem = str(error)
        log.warning("the CPU kernels are compiled again: %s cannot be used: %s", path, problem)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _compile_and_load(compiler: str, deadline: float, folder: Path | None, key: str) -> ctypes.CDLL:
    started = time.monotonic()
    include = jax.ffi.include_dir()
    sources = map(str, sorted(SOURCES.glob("*.cc")))
    try:
        with tempfile.TemporaryDirectory(prefix="muxjax-") as temporary:
            output = Path(temporary, "kernels.so")
            log.info("compiling the CPU kernels with %s", compiler)
            _run(
                compiler,
                [*_FLAGS, *FEATURE_FLAGS, f"-I{include}", *sources, "-o", str(output)],
                deadline,
            )
            data = output.read_bytes() if output.exists() else b""
            problem = _missing_symbol(data) if data else "the library is empty"
            if problem is not None:
                raise KernelsNotCompiled(f"{compiler} did not compile them: {problem}")
            log.info("compiled the CPU kernels in %.1f s", time.monotonic() - started)
            # An open library stays usable after its file is deleted.
            return _open(_store(folder, key, data) or output)
    except OSError as error:
        raise KernelsNotCompiled(f"they cannot be stored: {error}") from error


def _store(folder: Path | None, key: str, data: bytes) -> Path | None:
    """Stores a compiled library; returns None, with a line in the log, if that is not possible."""
    if folder is None:
        log.warning("the CPU kernels are compiled at each start: there is no cache folder")
        return None
    path = folder / f"kernels-{key}-{len(data)}-{_digest_of(data)}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        log.warning("the CPU kernels are compiled at each start: %s", error)
        return None
    return path


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsNotCompiled(f"they cannot be loaded: {error}") from error
    for symbol in SYMBOLS:
        if not hasattr(library, symbol):
            raise KernelsNotCompiled(f"they cannot be loaded: {symbol} is missing")
    return library


def _missing_symbol(data: bytes) -> str | None:
    # Names in a library's string table end with zero, and follow one.
    missing = [symbol for symbol in SYMBOLS if b"\0" + symbol.encode() + b"\0" not in data]
    return f"it lacks the symbol {missing[0]}" if missing else None


def _digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _cache_key(compiler_version: str) -> str:
    # Excludes the headers' folder, so that environments with the same jaxlib share the library.
    parts = [compiler_version, version("jaxlib"), *_FLAGS, *FEATURE_FLAGS]
    parts += [path.read_text("utf-8") for path in sorted(SOURCES.glob("*.[ch]*"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(compiler: str, arguments: Sequence[str], deadline: float) -> str:
    """Runs the compiler and returns its output.

    Raises:
      KernelsNotCompiled: it failed, or did not end before the deadline; then it has been killed
        with the processes that it started.
    """
    with tempfile.TemporaryFile() as output:  # a pipe would stay open in the compiler's children
        try:
            process = subprocess.Popen(
                [compiler, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise KernelsNotCompiled(f"{compiler} cannot be run: {error}") from error
        try:
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise KernelsNotCompiled(
                f"{compiler} did not finish within {_COMPILE_SECONDS:.0f} s"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    if status != 0:
        log.debug("%s printed: %s", compiler, text)
        lines = text.strip().splitlines() or [f"exit status {status}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise KernelsNotCompiled(f"{compiler} could not compile them: {reason}")
    return text
