"""What a fleet file may call a model's source, and the configs that it may hold itself.

Shared by loading (`loading.py`) and planning (`config_only.py`), so that both refuse the same.
Imports no JAX.
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
    """Whether it has the form `org/name` or `org/name@revision`."""
    return _HUB_ID.fullmatch(source) is not None


def read_inline_config(
    source: str, mapping: Mapping[str, Any] | None
) -> tuple[ModelConfig, int] | None:
    """The config and the seed of a source `config:FAMILY`; None of any other source.

    Args:
      source: as the fleet file has it.
      mapping: its `config`: keys as in Hugging Face's config.json, and `seed`.

    Raises:
      CheckpointError: an unknown family, or an option that is not supported.
      FleetConfigError: an unknown key, a seed that is no number, or a `config` beside a source that
        has its own.
    """
    if not source.startswith(_CONFIG):
        if mapping:
            raise FleetConfigError(
                f"`config` goes with a source `config:FAMILY`, not with {source}"
            )
        return None
    family = source.removeprefix(_CONFIG)
    mapping = dict(mapping or {})
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
    return config, seed
