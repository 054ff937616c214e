"""Compiling, storing and checking the library of the CPU kernels, on any processor with a compiler.

Most tests use a compiler that compiles empty functions with the right names, which is fast.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import psutil
import pytest

from muxjax.pallas_kernels.cpu import library, native
from muxjax.pallas_kernels.cpu.library import KernelsNotCompiled, damage_of, load_library

pytestmark = pytest.mark.faults
FAKE = """#!/bin/sh
echo "$1" >> {log}
[ "$1" = --version ] && echo 1.0 && exit 0
while [ "$1" != -o ]; do shift; done
exec {compiler} -shared -fPIC -o "$2" {source}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUXJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


def write_compiler(folder: Path, script: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "c++"
    path.write_text(script)
    path.chmod(0o755)
    return str(path)


class FakeCompiler:
    """A compiler of empty functions; records its runs."""

    def __init__(self, folder: Path) -> None:
        self._source, self._log = folder / "stub.cc", folder / "runs"
        self.define(library.SYMBOLS)
        script = FAKE.format(log=self._log, compiler=library.find_compiler(), source=self._source)
        self.path = write_compiler(folder / "bin", script)

    def define(self, symbols: tuple[str, ...]) -> None:
        functions = (f'extern "C" int {symbol}() {{ return 0; }}' for symbol in symbols)
        self._source.write_text("\n".join(functions) + "\n")

    @property
    def compilations(self) -> int:
        return sum(line != "--version" for line in self._log.read_text().splitlines())


@pytest.fixture
def compiler(tmp_path: Path) -> FakeCompiler:
    return FakeCompiler(tmp_path)


def stored(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def test_library_is_compiled_once(compiler: FakeCompiler, cache: Path) -> None:
    for _ in range(3):
        assert load_library(compiler.path).muxjax_heads() == 0
    assert compiler.compilations == 1
    assert damage_of(stored(cache)) is None


def without_symbols(path: Path) -> bytes:
    """A valid library without the kernels, of the same size."""
    other = path.with_name("other.so")
    source = path.with_name("other.cc")
    source.write_text("int other;")
    command = [str(library.find_compiler()), "-shared", "-fPIC", "-o", str(other), str(source)]
    subprocess.run(command, check=True)
    data = other.read_bytes()
    other.unlink()
    source.unlink()
    size = path.stat().st_size
    return data[:size] + b"\0" * (size - len(data))


DAMAGE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda path: b"", "it is empty"),
    "truncated": (lambda path: path.read_bytes()[:5000], "it has 5000 bytes instead of"),
    "longer": (lambda path: path.read_bytes() + b"x", "bytes instead of"),
    "zeros": (lambda path: b"\0" * path.stat().st_size, "its contents have changed"),
    "without symbols": (without_symbols, "its contents have changed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_library_is_compiled_again(
    damage: str, compiler: FakeCompiler, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_library(compiler.path)
    path = stored(cache)
    intact, (change, problem) = path.read_bytes(), DAMAGE[damage]
    damaged = change(path)
    path.unlink()  # this process has mapped the file
    path.write_bytes(damaged)
    assert load_library(compiler.path).muxjax_heads() == 0
    (line,) = caplog.messages
    assert line.startswith(f"the CPU kernels are compiled again: {path} cannot be used: ")
    assert problem in line
    assert stored(cache) == path
    assert path.read_bytes() == intact
    assert compiler.compilations == 2


@pytest.mark.parametrize("kind", ["no library", "no symbols"])
def test_stored_library_that_cannot_be_loaded_is_compiled_again(
    kind: str, compiler: FakeCompiler, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name has the right size and digest, such as after a change of the system's libraries."""
    load_library(compiler.path)
    path = stored(cache)
    names = b"\0" + b"\0".join(symbol.encode() for symbol in library.SYMBOLS) + b"\0"
    data = (b"no ELF" + names) if kind == "no library" else without_symbols(path)
    digest = library._digest_of(data)
    key = path.name.split("-")[1]
    path.unlink()
    path.with_name(f"kernels-{key}-{len(data)}-{digest}.so").write_bytes(data)
    load_library(compiler.path)
    assert len(caplog.messages) == 1
    expected = "cannot be loaded" if kind == "no library" else "it lacks the symbol muxjax_product"
    assert expected in caplog.messages[0]
    assert stored(cache) == path


def test_compiled_library_without_a_symbol_is_refused(compiler: FakeCompiler, cache: Path) -> None:
    compiler.define(library.SYMBOLS[1:])
    with pytest.raises(KernelsNotCompiled, match="it lacks the symbol muxjax_product_f32"):
        load_library(compiler.path)
    assert not cache.exists()


@pytest.mark.parametrize("kind", ["file", "full", "no home"])
def test_library_is_used_without_a_cache(
    kind: str,
    compiler: FakeCompiler,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    if kind == "file":
        cache.parent.write_text("")
    elif kind == "full":
        monkeypatch.setattr(library, "replace_file", fail)
    else:
        monkeypatch.setenv("MUXJAX_CACHE", "~no such user/cache")
    assert load_library(compiler.path).muxjax_heads() == 0
    (line,) = caplog.messages
    assert line.startswith("the CPU kernels are compiled at each start: ")


HANGS = "#!/bin/sh\n{condition}sleep 600 &\necho $$ $! > {pids}\nsleep 600\n"


@pytest.mark.parametrize("condition", ["", '[ "$1" = --version ] && exit 0\n'])
def test_compiler_that_hangs_is_ended(
    condition: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_COMPILE_SECONDS", 1.0)
    pids = tmp_path / "pids"
    compiler = write_compiler(tmp_path / "bin", HANGS.format(condition=condition, pids=pids))
    started = time.monotonic()
    with pytest.raises(KernelsNotCompiled, match=r"c\+\+ did not finish within 1 s"):
        load_library(compiler)
    assert time.monotonic() - started < 60
    assert not cache.exists()
    # Its children are ended too.
    while any(map(is_running, map(int, pids.read_text().split()))):
        assert time.monotonic() - started < 60
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "[ $1 = --version ] && exit 0\necho 'no room' >&2; exit 1\n",
            "could not compile .* no room",
        ),
        ("echo a; echo 'error: no room' >&2; exit 1\n", "could not compile them: error: no room"),
        ("exit 3\n", "could not compile them: exit status 3"),
        ("exit 0\n", "did not compile them: the library is empty"),
    ],
)
def test_compiler_error_is_one_line(
    script: str,
    reason: str,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """XLA computes instead, and the log says why."""
    compiler = write_compiler(tmp_path / "bin", "#!/bin/sh\n" + script)
    native._load.cache_clear()
    monkeypatch.delenv("MUXJAX_NATIVE", raising=False)
    monkeypatch.setattr(native, "_missing_features", list)
    monkeypatch.setattr(library, "find_compiler", lambda: compiler)
    try:
        assert str(native.unavailable_reason()).startswith(compiler)
        native.unavailable_reason()
    finally:
        native._load.cache_clear()
    (line,) = caplog.messages
    assert line.startswith("XLA computes products and attention, without the CPU kernels: ")
    assert re.search(reason, line)
    assert not cache.exists()


def test_other_sources_give_another_library(
    compiler: FakeCompiler, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_library(compiler.path)
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in library.SOURCES.glob("*.[ch]*"):
        (sources / path.name).write_text(path.read_text() + "\n// another\n")
    monkeypatch.setattr(library, "SOURCES", sources)
    load_library(compiler.path)
    assert len(list(cache.iterdir())) == 2


def test_sources_compile_without_warnings() -> None:
    """Ignores warnings in XLA's headers. Needs no processor with the kernels' instructions."""
    compiler = library.find_compiler()
    assert compiler is not None
    for path in library.SOURCES.glob("*.cc"):
        result = subprocess.run(
            [
                *(compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra"),
                *library.FEATURE_FLAGS,
                *("-isystem", jax.ffi.include_dir(), str(path)),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        lines = [line for line in result.stderr.splitlines() if line.startswith(str(path.parent))]
        assert not [line for line in lines if "warning" in line]


def test_the_kernels_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the machine's cache, since their compilation takes long."""
    monkeypatch.setattr(library, "_COMPILE_SECONDS", 600.0)
    compiler = library.find_compiler()
    assert compiler is not None
    loaded = load_library(compiler)
    assert all(hasattr(loaded, symbol) for symbol in library.SYMBOLS)
    assert damage_of(Path(loaded._name)) is None
