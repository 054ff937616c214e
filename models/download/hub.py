"""Checkpoints from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import httpx2
import huggingface_hub
import huggingface_hub.errors
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

from muxjax.errors import DownloadError
from muxjax.models.download import network
from muxjax.models.download.network import NetworkDown

_FILES = ("*.json", "*.safetensors", "*.jinja")


def fetch_from_hub(name: str, *, progress: bool = True) -> Path:
    """Downloads a repository's config, tokenizer and safetensors files; returns their folder.

    `huggingface_hub` resumes, verifies and caches the files. Its environment variables (`HF_HOME`,
    `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`) apply.

    Args:
      name: `org/name`, optionally followed by `@revision`.
      progress: show progress bars.

    Raises:
      DownloadError: the repository does not exist, access is denied, or there is no network and
        no cached copy.
    """
    repository, _, revision = name.partition("@")
    if not progress:
        disable_progress_bars()
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(_FILES)
        )
    except (
        huggingface_hub.errors.HfHubHTTPError,
        httpx2.HTTPError,
        httpx2.InvalidURL,
        OSError,
        ValueError,
    ) as error:
        reason = network.failure_of(error)
        if reason is not None:
            raise NetworkDown(f"{name} from the Hub (it is no local path)", reason) from error
        text = " ".join(str(error).split())
        raise DownloadError(
            f"{name}: not a local path, and cannot be downloaded from the Hub: {text}"
        ) from error
    finally:
        if not progress:
            enable_progress_bars()
    return Path(folder)
