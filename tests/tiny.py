"""Three tiny trained models for tests, made by `examples/train_tiny.py`, kept in the user's cache.

Training takes half a minute on two cores. It is done again only when something that the models
depend on has changed: the script, its text, the code of `models/`, or the version of JAX.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from muxjax.cache import cache_folder

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_tiny.py"
TEXT = ROOT / "examples" / "data" / "sonnets.txt"
FAMILIES = ("llama", "qwen3", "gemma3")
"""The models' names; they are in the folders `NAME/orbax` and `NAME/safetensors`."""
_DAY = 86400.0


def learned() -> str:
    """The text that the models know by heart: the first sonnet."""
    text = TEXT.read_text("utf-8")
    return text[: text.index("SONNET 29")]


@functools.cache
def trained() -> Path:
    """The folder of the models; they are trained if the cache does not have them."""
    cache = cache_folder() / "tests"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"tiny-{_digest()}"
    # One trains, also where pytest-xdist runs several processes; the others wait for it.
    with FileLock(cache / "tiny.lock"):
        if not folder.exists():
            for old in cache.glob("tiny-*"):
                if time.time() - old.stat().st_mtime > _DAY:  # not those of another run
                    shutil.rmtree(old)
            _train(folder)
        os.utime(folder)
    return folder


def _train(folder: Path) -> None:
    unfinished = folder.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--output", unfinished],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    unfinished.rename(folder)


def _digest() -> str:
    found = hashlib.sha256()
    for name in ("jax", "flax", "optax", "orbax-checkpoint"):
        found.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    for path in _sources():
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _sources() -> Iterator[Path]:
    yield from (SCRIPT, TEXT)
    yield from sorted((ROOT / "models").glob("*.py"))
