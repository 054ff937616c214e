"""A short hash of what a plan or a simulation was made from, to tell results apart."""

from __future__ import annotations

import hashlib
import json


def config_hash(settings: object) -> str:
    """Of plain data: the same for the same settings on every machine."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
