"""Opens checkpoints of every kind of source that a fleet file supports."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.checkpoints.sources import is_hub_id, read_inline_config


def open_checkpoint(
    source: str | Path,
    *,
    config_mapping: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Opens a checkpoint: reads its header and checks architecture and shapes. Reads no weights.

    Args:
      source: a GGUF file; a llama2.c `.bin` file; a Hugging Face folder (config.json and
        safetensors); an Orbax folder written by `orbax.save`; `demo:NAME`; `config:FAMILY` (random
        weights); or, if no such path exists, a Hub id `org/name` with an optional `@revision`.
      config_mapping: for `config:FAMILY`: keys as in Hugging Face's config.json, and `seed`.
      progress: show a progress bar for each download.

    Raises:
      CheckpointError: the source cannot be opened or is not supported.
      DownloadError: the download failed.
      FleetConfigError: `config_mapping` has an unknown key, or the source is not `config:FAMILY`.
    """
    text = str(source)
    inline = read_inline_config(text, config_mapping)
    if inline is not None:
        from muxjax.models.checkpoints.random_weights import open_random

        config, seed = inline
        return open_random(config, text, seed)
    if text.startswith("demo:"):
        from muxjax.models.download.demo import fetch_demo

        return _open_path(fetch_demo(text.removeprefix("demo:"), progress=progress))
    path = Path(source).expanduser()
    if not path.exists() and is_hub_id(text):
        from muxjax.models.download.hub import fetch_from_hub

        path = fetch_from_hub(text, progress=progress)
    return _open_path(path)


def _open_path(path: Path) -> Checkpoint:
    if path.is_dir():
        if (path / "muxjax.json").is_file():
            from muxjax.models.checkpoints.orbax_reader import open_orbax

            return open_orbax(path)
        if (path / "config.json").is_file():
            from muxjax.models.checkpoints.hf import open_hf

            return open_hf(path)
        if (path / "params").is_dir() or (path / "muxjax.json.unfinished").is_file():
            raise CheckpointError(
                f"{path}: incomplete, it has no muxjax.json: writing it has not finished; "
                "delete the folder and convert the model again"
            )
        raise CheckpointError(f"{path}: neither config.json nor muxjax.json in this folder")
    if not path.is_file():
        unfinished = next(path.parent.glob(f"{glob.escape(path.name)}.unfinished-*"), None)
        if unfinished is not None:
            raise CheckpointError(
                f"{path}: incomplete: its conversion runs or was stopped ({unfinished.name}): "
                "wait for it, or convert the model again"
            )
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".bin":
        from muxjax.models.checkpoints.llama2c import open_llama2c

        return open_llama2c(path)
    from muxjax.models.checkpoints.gguf import open_gguf

    return open_gguf(path)
