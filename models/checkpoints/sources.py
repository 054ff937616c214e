"""Sources of models in a fleet file, and configs that a fleet file contains inline.

Shared by loading (`loading.py`) and planning (`config_only.py`), so that both reject the same
sources. Imports no JAX.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from muxjax.errors import FleetConfigError
from muxjax.models.checkpoints.hf_config import DEFAULTS, OTHER_KEYS, from_family
from muxjax.models.nn.config import ModelConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_CONFIG = "config:"


def is_hub_id(source: str) -> bool:
    """Whether a source has the form `org/name` or `org/name@revision`."""
    return _HUB_ID.fullmatch(source) is not None


def read_inline_config(
    source: str, mapping: Mapping[str, Any] | None
) -> tuple[ModelConfig, int] | None:
    """The config and the seed of a source `config:FAMILY`; None for any other source.

    Args:
      source: the model's `source` in the fleet file.
      mapping: the model's `config`: keys as in Hugging Face's config.json, and `seed`.

    Raises:
      CheckpointError: the family is unknown, or an option is not supported.
      FleetConfigError: an unknown key, a seed that is not an integer, or a `config` for another
        kind of source.
    """
    if not source.startswith(_CONFIG):
        if mapping:
            raise FleetConfigError(f"`config` requires a source `config:FAMILY`, not {source}")
        return None
    family = source.removeprefix(_CONFIG)
    mapping = dict(mapping or {})
    seed = mapping.pop("seed", 0)
    if not isinstance(seed, int):
        raise FleetConfigError(f"config.seed must be a whole number, not {seed!r}")
    config = from_family(family, mapping)
    # A config.json has keys for other programs. This mapping is for MuxJAX only: check them all.
    known = {*DEFAULTS[config.family], *OTHER_KEYS}
    unknown = sorted(mapping.keys() - known)
    if unknown:
        raise FleetConfigError(
            f"config.{unknown[0]} is not a key of {family}; known: "
            f"{', '.join(sorted(known | {'seed'}))}"
        )
    return config, seed
