"""A fleet file of two tiny models, and variants of it."""

from __future__ import annotations

import copy
from typing import Any

from tests.muxjax.tiny_fleets import entry, fleet

EXTRA = {**entry("qwen3"), "name": "extra", "rate": 2.0}
FILE = fleet("llama", "qwen3", max_seqs=2, prefill_tokens=16)


def changed(**models: dict[str, Any] | None) -> dict[str, Any]:
    """The file with other models: None removes one."""
    file = copy.deepcopy(FILE)
    entries = {model["name"]: model for model in file["models"]}
    entries.update({name: made for name, made in models.items() if made})
    file["models"] = [made for name, made in entries.items() if models.get(name, made)]
    return file
