"""Downloads the repository `org/tiny` from the Hub at HF_ENDPOINT; prints errors in one line."""

from __future__ import annotations

import sys

from muxjax.errors import DownloadError
from muxjax.models.download.hub import fetch_from_hub

try:
    fetch_from_hub("org/tiny")
except DownloadError as error:
    sys.exit(f"muxjax: {error}")
