"""Converts MuxServe's `models.yaml` to a fleet file: models with rates, cluster, mean lengths.

    cluster: {nnodes: 4, ngpus_per_node: 8}
    models:
    - {name: llm-1, model: .../llama-13b, rate: 2.5}
    avg_prompt_len: 161
    avg_output_len: 337

Source: hao-ai-lab/MuxServe, `examples/basic/models.yaml` and `benchmark/chatlmsys/yamls`. A LLaMA
model is recognized by the last part of its path, as in MuxServe's profile. The source of any other
model is its path. The devices are A100s with 80 GB. Imports no JAX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muxjax.config.yaml_lines import read_yaml
from muxjax.errors import FleetConfigError
from muxjax.placement.costs.model_shape import LLAMA_SHAPES

DEVICE = "a100-80gb"


def read_muxserve(path: Path) -> dict[str, Any]:
    """Returns the contents of the equivalent fleet file.

    Raises:
      FleetConfigError: the file cannot be read or is not valid; the message contains line and key.
    """
    data, lines = read_yaml(path)
    return _Reader(str(path), lines).fleet(data)


class _Reader:
    """Converts one file; `lines` maps each key to its line, for error messages."""

    def __init__(self, where: str, lines: Mapping[str, int]) -> None:
        self._where = where
        self._lines = lines

    def fleet(self, data: object) -> dict[str, Any]:
        if not isinstance(data, Mapping) or not isinstance(data.get("models"), list):
            raise self._fault("models", "a list of models is needed")
        if not data["models"]:
            raise self._fault("models", "must not be empty")
        lengths = {}
        for muxserve_key, key in (
            ("avg_prompt_len", "prompt_tokens"),
            ("avg_output_len", "output_tokens"),
        ):
            if data.get(muxserve_key) is not None:
                lengths[key] = self._number(data, muxserve_key, muxserve_key)
        fleet: dict[str, Any] = {
            "models": [
                self._model(model, f"models[{index}]") | lengths
                for index, model in enumerate(data["models"])
            ]
        }
        cluster = self._cluster(data)
        if cluster is not None:
            fleet["cluster"] = cluster
        return fleet

    def _cluster(self, data: Mapping[str, Any]) -> str | None:
        if "cluster" in data:
            cluster = data["cluster"]
            if not isinstance(cluster, Mapping):
                raise self._fault("cluster", "must be a mapping with nnodes and ngpus_per_node")
            nodes = self._count(cluster, "nnodes", "cluster.nnodes")
            devices = self._count(cluster, "ngpus_per_node", "cluster.ngpus_per_node")
            return f"{nodes}x{devices}:{DEVICE}"
        if "num_gpus" in data:
            return f"1x{self._count(data, 'num_gpus', 'num_gpus')}:{DEVICE}"
        return None

    def _model(self, model: object, key: str) -> dict[str, Any]:
        if not isinstance(model, Mapping):
            raise self._fault(key, "must be a mapping with name, model and rate")
        for field in ("name", "model"):
            if not isinstance(model.get(field), str) or not model[field]:
                raise self._fault(f"{key}.{field}", "must be text")
        if "rate" not in model:
            raise self._fault(
                f"{key}.rate", f"missing: {model['name']} needs its requests per second"
            )
        entry: dict[str, Any] = {
            "name": model["name"],
            "rate": self._number(model, "rate", f"{key}.rate"),
        }
        kind = model["model"].rstrip("/").rsplit("/", 1)[-1].lower()
        if kind in LLAMA_SHAPES:
            shape = LLAMA_SHAPES[kind]
            config = {
                "hidden_size": shape.hidden_size,
                "intermediate_size": shape.intermediate_size,
                "num_hidden_layers": shape.num_layers,
                "num_attention_heads": shape.num_heads,
            }
            return entry | {"source": "config:llama", "config": config, "profile": kind}
        return entry | {"source": model["model"]}

    def _number(self, mapping: Mapping[str, Any], name: str, key: str) -> float:
        value = mapping[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._fault(key, f"must be a number; got {value!r}")
        if not (math.isfinite(value) and value > 0):
            raise self._fault(key, f"must be a finite number above 0; got {value}")
        return float(value)

    def _count(self, mapping: Mapping[str, Any], name: str, key: str) -> int:
        value = mapping.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._fault(key, f"must be a whole number of at least 1; got {value!r}")
        return value

    def _fault(self, key: str, message: str) -> FleetConfigError:
        line = self._lines.get(key)
        parent = key
        while line is None and "." in parent:
            parent = parent.rsplit(".", 1)[0]
            line = self._lines.get(parent)
        return FleetConfigError(f"{self._where}:{f'{line}:' if line else ''} {key}: {message}")
