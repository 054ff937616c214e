"""The fleet file: the models to serve, their expected load, and the settings. Imports no JAX.

A fleet file is YAML (see examples/demo.yaml for one with comments):

    models:
      - name: chat
        source: demo:smollm2-135m
    pool:
      memory: 512MB

`load_fleet_config` also takes the contents as a mapping. An invalid file raises one
`FleetConfigError` with a line per problem: file and line, path of the key, the value and the
allowed values (`validation_messages`). Values are not coerced, and unknown keys are errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from muxjax.config.memory_size import Memory
from muxjax.config.model_entry import ModelEntry, SloConfig
from muxjax.config.section import Positive, Section, null_is_empty
from muxjax.config.server import ServerConfig
from muxjax.config.validation_messages import format_value, validation_messages
from muxjax.config.yaml_lines import read_yaml
from muxjax.errors import FleetConfigError, PlanError
from muxjax.placement.costs.cluster import parse_cluster

_FILE_SUFFIXES = (".gguf", ".bin", ".data", ".safetensors", ".json")


def _cluster(value: str) -> str:
    try:
        parse_cluster(value)
    except PlanError as error:
        raise PydanticCustomError("cluster", "{reason}", {"reason": str(error)}) from error
    return value


Cluster = Annotated[str, AfterValidator(_cluster)]


# Imports the registry here: it needs NumPy, which `muxjax --help` does not.
def _policy(value: str) -> str:
    from muxjax.scheduling.policies.registry import policy_names

    names = policy_names()
    if value not in names:
        expected = f"{', '.join(names[:-1])} or {names[-1]}"
        raise PydanticCustomError("literal_error", "unknown policy", {"expected": expected})
    return value


def _describe_policies(schema: dict[str, Any]) -> None:
    """Adds the names and descriptions of all policies to the field's JSON schema."""
    from muxjax.scheduling.policies.registry import get_policy, policy_names

    entries = [get_policy(name) for name in policy_names()]
    schema["enum"] = [entry.name for entry in entries]
    schema["description"] += ": "
    schema["description"] += "; ".join(f"{entry.name}, {entry.description}" for entry in entries)
    schema["description"] += "."


KnownPolicy = Annotated[str, AfterValidator(_policy)]


class PoolConfig(Section):
    """The KV cache pool, shared by all models of a unit."""

    memory: Memory | None = Field(
        default=None, description="Size of the pool, such as 1GB or 512MiB; by default computed."
    )
    prefix_cache: bool = Field(
        default=True,
        description="Automatic prefix caching: keep the KV cache of finished requests while there "
        "is room, and reuse it for prompts with the same beginning.",
    )


class EngineConfig(Section):
    """Sizes of the compiled steps. Larger sizes need more compile time and more memory."""

    max_seqs: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=16, description="Maximum number of sequences of a model that run at once."
    )
    prefill_tokens: Annotated[int, Field(ge=16, le=65536)] | None = Field(
        default=None,
        description="Maximum number of prompt tokens in one prefill step; longer prompts are "
        "chunked. By default 128 on a CPU and 1024 elsewhere.",
    )
    decode_tokens: Annotated[int, Field(ge=1, le=256)] = Field(
        default=8,
        description="Maximum number of tokens that one decode step generates per sequence.",
    )


class FleetConfig(Section):
    """The contents of a fleet file."""

    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1, strict=False)] = Field(
        description="The models to serve."
    )
    pool: Annotated[PoolConfig, null_is_empty] = Field(
        default_factory=PoolConfig, description="The shared KV cache pool."
    )
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=1,
        description="Number of devices that the fleet runs on and its models are sharded over.",
    )
    policy: KnownPolicy = Field(
        default="adbs",
        description="Scheduling policy",
        json_schema_extra=_describe_policies,
    )
    idle_timeout: Positive | None = Field(
        default=None,
        description="Idle time in seconds after which an unpinned model is put to sleep, unless "
        "the model sets its own idle_timeout; by default never.",
    )
    refuse_late: bool = Field(
        default=False,
        description="Refuse requests at once that cannot meet their latency targets.",
    )
    engine: Annotated[EngineConfig, null_is_empty] = Field(
        default_factory=EngineConfig, description="Sizes of the compiled steps."
    )
    server: Annotated[ServerConfig, null_is_empty] = Field(
        default_factory=ServerConfig, description="Limits and timeouts of `muxjax serve`."
    )
    cluster: Cluster | None = Field(
        default=None,
        description="The devices that `muxjax plan` places the models on: NODESxDEVICES:DEVICE, "
        "such as 4x8:a100-80gb; several are separated by commas.",
    )

    @model_validator(mode="after")
    def _models_agree(self) -> Self:
        seen: dict[str, int] = {}
        for index, model in enumerate(self.models):
            if model.name in seen:
                raise PydanticCustomError(
                    "duplicate_name",
                    "models[{index}].name: {name} is already the name of models[{first}]",
                    {"index": index, "name": repr(model.name), "first": seen[model.name]},
                )
            seen[model.name] = index
        floors = sum(model.kv_floor or 0.0 for model in self.models)
        if floors > 1.0 + 1e-9:
            raise PydanticCustomError(
                "floors",
                "models[*].kv_floor: the floors add up to {total} of the pool; the maximum is 1",
                {"total": f"{floors:.4g}"},
            )
        return self


def load_fleet_config(
    source: FleetConfig | Mapping[str, Any] | str | os.PathLike[str],
) -> FleetConfig:
    """Reads and checks a fleet file, or its contents as a mapping.

    Relative paths of sources become absolute. They start in the folder of the file, or for a
    mapping in the working folder.

    Raises:
      FleetConfigError: the file cannot be read, or is not a valid fleet file.
    """
    if isinstance(source, FleetConfig):
        return source
    if isinstance(source, Mapping):
        return _validate(source, folder=Path.cwd(), file="", lines={})
    path = Path(source).expanduser()
    data, lines = read_yaml(path)
    if not isinstance(data, dict):
        raise FleetConfigError(
            f"{path}: a fleet file is a mapping with `models:`, not {format_value(data)}"
        )
    return _validate(data, folder=path.parent.absolute(), file=str(path), lines=lines)


def load_model_entry(data: Mapping[str, Any]) -> ModelEntry:
    """Checks the entry of one model; paths are relative to the working folder.

    Raises:
      FleetConfigError: the entry is not valid.
    """
    return load_fleet_config({"models": [dict(data)]}).models[0]


def fleet_json_schema() -> dict[str, Any]:
    """Returns the fleet file's JSON Schema, for editors."""
    schema = FleetConfig.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "MuxJAX fleet file",
    }


def _validate(
    data: Mapping[str, Any], *, folder: Path, file: str, lines: Mapping[str, int]
) -> FleetConfig:
    try:
        config = FleetConfig.model_validate(dict(data))
    except ValidationError as error:
        message = validation_messages(error, file, lines, _known_keys)
        raise FleetConfigError(message) from error
    models = tuple(
        model.model_copy(update={"source": _resolve_source(model.source, folder)})
        for model in config.models
    )
    return config.model_copy(update={"models": models})


def _resolve_source(source: str, folder: Path) -> str:
    """Returns a source with an absolute path; Hub ids and `scheme:` sources are unchanged.

    `org/name` is a Hub id unless such a path exists. A source that starts with a dot, a tilde or a
    slash, or has a file suffix, is always a path: a missing file is reported with its full path.
    """
    if source.startswith(("demo:", "config:")):
        return source
    path = Path(source).expanduser()
    if path.is_absolute():
        return str(path)
    is_path = source.startswith((".", "~")) or source.lower().endswith(_FILE_SUFFIXES)
    absolute = Path(os.path.normpath(folder / path))
    return str(absolute) if is_path or absolute.exists() else source


def _known_keys(location: list[int | str]) -> list[str]:
    """Returns the keys that are allowed as the last key of `location`."""
    if "slo" in location[:-1]:
        return list(SloConfig.model_fields)
    sections: dict[str, type[BaseModel]] = {
        "models": ModelEntry,
        "pool": PoolConfig,
        "engine": EngineConfig,
        "server": ServerConfig,
    }
    section = sections.get(str(location[0]), FleetConfig) if len(location) > 1 else FleetConfig
    return list(section.model_fields)
