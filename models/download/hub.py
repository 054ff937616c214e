"""Checkpoints from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

from muxjax.errors import DownloadError

_FILES = ("*.json", "*.safetensors", "*.jinja")


def fetch_from_hub(name: str, *, progress: bool = True) -> Path:
    """Fetches a repository's config, tokenizer and safetensors; returns their folder.

    Files are resumed, checked and cached by `huggingface_hub`, whose environment variables
    (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`) hold.

    Args:
      name: `org/name`, and perhaps `@revision`.
      progress: show bars.

    Raises:
      DownloadError: there is no such repository, access is refused, or there is no network and
        nothing cached.
    """
    repository, _, revision = name.partition("@")
    if not progress:
        disable_progress_bars()
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(_FILES)
        )
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise DownloadError(
            f"{name}: neither a local path nor fetched from the Hub: {error}"
        ) from error
    finally:
        if not progress:
            enable_progress_bars()
    return Path(folder)
