"""A fleet file of two tiny models, and variants of it."""

from __future__ import annotations

import copy
from typing import Any

from tests.muxjax.tiny_fleets import entry, fleet

EXTRA = {**entry("qwen3"), "name": "extra", "rate": 2.0}
FILE = fleet("llama", "qwen3", max_seqs=2, prefill_tokens=16)


def changed(**models: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the file with these models added or replaced; None removes a model."""
    file = copy.deepcopy(FILE)
    entries = {model["name"]: model for model in file["models"]}
    entries.update({name: model for name, model in models.items() if model})
    file["models"] = [model for name, model in entries.items() if models.get(name, model)]
    return file
