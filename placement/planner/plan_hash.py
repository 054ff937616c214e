"""A short hash of the inputs of a plan or simulation, to tell results apart."""

from __future__ import annotations

import hashlib
import json


def config_hash(settings: object) -> str:
    """Hashes plain data: 16 hex digits, the same on every machine."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
