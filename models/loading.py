"""The one entry to checkpoints: from what a fleet file calls a source to an open checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muxjax.errors import CheckpointError, FleetConfigError
from muxjax.models.checkpoint import Checkpoint

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def open_checkpoint(
    source: str | Path,
    *,
    config_mapping: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Opens a checkpoint: reads its header, and checks architecture and shapes. Reads no weights.

    Args:
      source: a GGUF file; a llama2.c `.bin` file; a Hugging Face folder (config.json and
        safetensors); an Orbax folder written by `models.orbax.save`; `demo:NAME`; `config:FAMILY`
        (random weights); or, where no such path exists, a Hub id `org/name` (`@revision`).
      config_mapping: for `config:FAMILY`, keys as in Hugging Face's config.json, and `seed`.
      progress: show bars while something is fetched.

    Raises:
      CheckpointError: it cannot be opened or is not supported.
      DownloadError: it cannot be fetched.
      FleetConfigError: `config_mapping` has an unknown key, or goes with a source that has its own
        config.
    """
    text = str(source)
    if text.startswith("config:"):
        return _open_config(text, dict(config_mapping or {}))
    if config_mapping:
        raise FleetConfigError(f"`config` goes with a source `config:FAMILY`, not with {text}")
    if text.startswith("demo:"):
        from muxjax.models.demo import fetch_demo

        return _open_path(fetch_demo(text.removeprefix("demo:"), progress=progress))
    path = Path(source).expanduser()
    if not path.exists() and _HUB_ID.fullmatch(text):
        from muxjax.models.hub import fetch_from_hub

        path = fetch_from_hub(text, progress=progress)
    return _open_path(path)


def _open_config(source: str, mapping: dict[str, Any]) -> Checkpoint:
    from muxjax.models.hf_config import DEFAULTS, OTHER_KEYS, from_family
    from muxjax.models.random_weights import open_random

    family = source.removeprefix("config:")
    seed = mapping.pop("seed", 0)
    if not isinstance(seed, int):
        raise FleetConfigError(f"config.seed must be a whole number, not {seed!r}")
    config = from_family(family, mapping)
    # Unlike a config.json, which is full of keys for others, this mapping is for us alone.
    known = {*DEFAULTS[config.family], *OTHER_KEYS}
    unknown = sorted(mapping.keys() - known)
    if unknown:
        raise FleetConfigError(
            f"config.{unknown[0]} is no key of {family}; there are "
            f"{', '.join(sorted(known | {'seed'}))}"
        )
    return open_random(config, source, seed)


def _open_path(path: Path) -> Checkpoint:
    if path.is_dir():
        if (path / "muxjax.json").is_file():
            from muxjax.models.orbax import open_orbax

            return open_orbax(path)
        if (path / "config.json").is_file():
            from muxjax.models.hf import open_hf

            return open_hf(path)
        raise CheckpointError(f"{path}: neither config.json nor muxjax.json in this folder")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if path.suffix == ".bin":
        from muxjax.models.llama2c import open_llama2c

        return open_llama2c(path)
    from muxjax.models.gguf import open_gguf

    return open_gguf(path)
