"""Three tiny models for tests, trained by `examples/train_tiny.py` and kept in the user's cache.

Training takes half a minute on two cores. It is repeated only if the script, its text, the code of
`models/`, or the version of JAX or its libraries has changed.
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
    """The text that the models have memorized: the first sonnet."""
    text = TEXT.read_text("utf-8")
    return text[: text.index("SONNET 29")]


@functools.cache
def trained() -> Path:
    """The folder of the models, which are trained if they are not in the cache."""
    cache = cache_folder() / "tests"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"tiny-{_digest()}"
    # With pytest-xdist, one process trains, and the others wait for it.
    with FileLock(cache / "tiny.lock"):
        if not folder.exists():
            for old in cache.glob("tiny-*"):
                if time.time() - old.stat().st_mtime > _DAY:  # newer ones may be in use
                    shutil.rmtree(old)
            _train(folder)
        os.utime(folder)
    return folder


def _train(folder: Path) -> None:
    unfinished = folder.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    completed = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--output", unfinished],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    unfinished.rename(folder)


def _digest() -> str:
    digest = hashlib.sha256()
    for name in ("jax", "flax", "optax", "orbax-checkpoint"):
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    for path in _sources():
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _sources() -> Iterator[Path]:
    yield from (SCRIPT, TEXT)
    yield from sorted((ROOT / "models").glob("*.py"))
