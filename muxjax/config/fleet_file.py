"""The fleet file: which models to serve, from one pool, with what expectations. Imports no JAX.

A fleet file is YAML (docs/fleet-file.md; examples/demo.yaml is a commented one):

    models:
      - name: chat
        source: demo:smollm2-135m
    pool:
      memory: 512MB

`load_fleet_config` also takes the same as a dict. Whatever is wrong is raised as one
`FleetConfigError` with a line for each fault: the file and line where the key stands, the key's
path as written in the file, what was found and what may stand there. Nothing is coerced and no
unknown key is passed over.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from muxjax.config.memory_size import Memory
from muxjax.config.server import ServerConfig
from muxjax.config.yaml_lines import read_yaml
from muxjax.errors import FleetConfigError, PlanError
from muxjax.placement.costs.cluster import parse_cluster
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.specs import DEFAULT_SCALE, LatencySlo

_FILE_SUFFIXES = (".gguf", ".bin", ".data", ".safetensors", ".json")
# `pool:` with every line under it commented out is null in YAML.
_absent_is_empty = BeforeValidator(lambda value: {} if value is None else value)

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\s\x00-\x1f]+$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _cluster(value: str) -> str:
    try:
        parse_cluster(value)
    except PlanError as error:
        raise PydanticCustomError("cluster", "{reason}", {"reason": str(error)}) from error
    return value


Cluster = Annotated[str, AfterValidator(_cluster)]


# The registry is imported when it is read: it needs NumPy, which `muxjax --help` does not.
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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SloConfig(_Section):
    """Latency targets of a model, in seconds."""

    ttft: Positive | None = Field(
        default=None, description="To the first token, on average; by default no target."
    )
    tpot: Positive | None = Field(
        default=None,
        description="For each token after the first, on average; by default no target.",
    )
    scale: Positive = Field(
        default=DEFAULT_SCALE,
        description="For what has no target: how many times longer than a request that is alone "
        "requests may take, under the slo policy.",
    )

    @property
    def latency_slo(self) -> LatencySlo:
        """The targets as the scheduler, planner and server use them."""
        return LatencySlo(self.ttft, self.tpot, self.scale)


class ModelEntry(_Section):
    """One model of the fleet, and what is expected of it."""

    name: Name = Field(description="What requests call the model.")
    source: Annotated[str, Field(min_length=1)] = Field(
        description="A GGUF file, a Hugging Face or MuxJAX folder, a Hub id (org/name), demo:NAME, "
        "or config:FAMILY for random weights. Paths are relative to the fleet file."
    )
    config: dict[str, Any] | None = Field(
        default=None,
        description="The model's shape for a config:FAMILY source, in the keys of Hugging Face's "
        "config.json.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision of weights and cache; auto picks the device's fastest.",
    )
    quantization: Literal["none", "int8"] = Field(
        default="none",
        description="int8: all matrices and the activations that they multiply are rounded to 8 "
        "bits. Fastest on a CPU from two requests at once, and a quarter of the memory.",
    )
    rate: Positive = Field(default=1.0, description="Requests a second that are expected.")
    prompt_tokens: Positive = Field(
        default=161.0, description="Mean prompt length expected (161: ShareGPT's)."
    )
    output_tokens: Positive = Field(
        default=338.0, description="Mean output length expected (338: ShareGPT's)."
    )
    max_model_len: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Most tokens of prompt and output together; by default what the model allows.",
    )
    kv_floor: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Fraction of the pool that is always this model's; by default computed from "
        "the rates and lengths.",
    )
    slo: Annotated[SloConfig, _absent_is_empty] = Field(
        default_factory=SloConfig, description="Latency targets, which planning counts with."
    )
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None,
        description="Devices that one copy of the model is cut for; must divide the fleet's "
        "tensor_parallel, which is the default. With fewer, copies stand side by side.",
    )
    profile: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="What a profile of step times calls this model; by default its name.",
    )
    pinned: bool = Field(default=False, description="The model is never put to sleep.")
    idle_timeout: Positive | None = Field(
        default=None,
        description="Seconds without a request after which the model sleeps; by default the "
        "fleet's idle_timeout.",
    )
    sleeping: bool = Field(
        default=False,
        description="Not loaded at the start: the first request loads the model, and waits for it.",
    )

    @model_validator(mode="after")
    def _pinned_is_awake(self) -> Self:
        for key in ("sleeping", "idle_timeout"):
            if self.pinned and getattr(self, key):
                raise PydanticCustomError(
                    "pinned", "pinned models never sleep: remove {key}", {"key": key}
                )
        return self

    @model_validator(mode="after")
    def _config_and_source_agree(self) -> Self:
        shaped = self.source.startswith("config:")
        if shaped and not self.config:
            raise PydanticCustomError(
                "missing_config",
                "the source {source} needs a config: mapping",
                {"source": self.source},
            )
        if not shaped and self.config is not None:
            raise PydanticCustomError(
                "surplus_config",
                "config: is only for config:FAMILY sources; {source} brings its own",
                {"source": self.source},
            )
        return self

    @property
    def expected_load(self) -> ExpectedLoad:
        """Rate and mean lengths as the scheduler and planner use them."""
        return ExpectedLoad(self.rate, self.prompt_tokens, self.output_tokens)

    def check_length(self, max_position: int) -> None:
        """Raises FleetConfigError if sequences are to be longer than the model's context."""
        if self.max_model_len is not None and self.max_model_len > max_position:
            raise FleetConfigError(
                f"max_model_len of {self.name} is {self.max_model_len}; the model's own context "
                f"length is {max_position}"
            )


class PoolConfig(_Section):
    """The KV pool that all models of the unit share."""

    memory: Memory | None = Field(
        default=None, description="Bytes of the pool, e.g. 1GB or 512MiB; by default computed."
    )
    prefix_cache: bool = Field(
        default=True,
        description="Keep the keys and values of prompts and answers as long as there is room, so "
        "that a prompt that begins like an earlier one of its model need not be computed whole.",
    )


class EngineConfig(_Section):
    """Sizes of the compiled steps. Larger ones take longer to compile and more memory."""

    max_seqs: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=16, description="Most sequences of a model that run at once."
    )
    prefill_tokens: Annotated[int, Field(ge=16, le=65536)] | None = Field(
        default=None,
        description="Most prompt tokens in one prefill step; longer prompts are chunked. By "
        "default 128 on a CPU and 1024 elsewhere.",
    )
    decode_tokens: Annotated[int, Field(ge=1, le=256)] = Field(
        default=8, description="Most tokens that a decode step makes for each sequence."
    )


class FleetConfig(_Section):
    """A whole fleet file."""

    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1, strict=False)] = Field(
        description="The models to serve."
    )
    pool: Annotated[PoolConfig, _absent_is_empty] = Field(
        default_factory=PoolConfig, description="The shared KV pool."
    )
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=1, description="Devices that the fleet runs on, its models cut among them."
    )
    policy: KnownPolicy = Field(
        default="adbs",
        description="Scheduling policy",
        json_schema_extra=_describe_policies,
    )
    idle_timeout: Positive | None = Field(
        default=None,
        description="Seconds without a request after which a model that is not pinned sleeps; by "
        "default none does.",
    )
    refuse_late: bool = Field(
        default=False,
        description="Refuse requests at once that could not be served within their targets.",
    )
    engine: Annotated[EngineConfig, _absent_is_empty] = Field(
        default_factory=EngineConfig, description="Sizes of the compiled steps."
    )
    server: Annotated[ServerConfig, _absent_is_empty] = Field(
        default_factory=ServerConfig, description="Limits and time-outs of `muxjax serve`."
    )
    cluster: Cluster | None = Field(
        default=None,
        description="What `muxjax plan` places the models on: NODESxDEVICES:DEVICE, as in "
        "4x8:a100-80gb; several separated by commas.",
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
                "models[*].kv_floor: the floors add up to {total} of the pool; at most 1 is there",
                {"total": f"{floors:.4g}"},
            )
        return self


def load_fleet_config(
    source: FleetConfig | Mapping[str, Any] | str | os.PathLike[str],
) -> FleetConfig:
    """Reads and checks a fleet file, or the same as a mapping.

    Sources that are relative paths are made absolute: from the file's folder, or from the working
    folder for a mapping.

    Raises:
      FleetConfigError: the file cannot be read or is not a valid fleet file.
    """
    if isinstance(source, FleetConfig):
        return source
    if isinstance(source, Mapping):
        return _checked(source, folder=Path.cwd(), where="", lines={})
    path = Path(source).expanduser()
    data, lines = read_yaml(path)
    if not isinstance(data, dict):
        raise FleetConfigError(
            f"{path}: a fleet file is a mapping with `models:`, not {_shown(data)}"
        )
    return _checked(data, folder=path.parent.absolute(), where=str(path), lines=lines)


def load_model_entry(data: Mapping[str, Any]) -> ModelEntry:
    """Checks one model's entry; paths are relative to the working folder.

    Raises:
      FleetConfigError: it is not valid.
    """
    return load_fleet_config({"models": [dict(data)]}).models[0]


def fleet_json_schema() -> dict[str, Any]:
    """The fleet file's JSON Schema, for editors."""
    schema = FleetConfig.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "MuxJAX fleet file",
    }


def _checked(
    data: Mapping[str, Any], *, folder: Path, where: str, lines: Mapping[str, int]
) -> FleetConfig:
    try:
        config = FleetConfig.model_validate(dict(data))
    except ValidationError as error:
        faults = [
            _fault(details, where, lines)
            for details in error.errors(include_url=False)
            # A list whose entries are at fault is reported as too short as well.
            if not (details["type"] == "too_short" and details["input"])
        ]
        raise FleetConfigError("\n".join(faults)) from error
    models = tuple(
        model.model_copy(update={"source": _resolved(model.source, folder)})
        for model in config.models
    )
    return config.model_copy(update={"models": models})


def _resolved(source: str, folder: Path) -> str:
    """A source with its path made absolute; Hub ids and `scheme:` sources as they are.

    `org/name` is a Hub id unless such a path exists; what starts with a dot, a tilde or a slash or
    ends like a file is a path either way, so that a missing file is reported with its whole path.
    """
    if source.startswith(("demo:", "config:")):
        return source
    path = Path(source).expanduser()
    if path.is_absolute():
        return str(path)
    like_path = source.startswith((".", "~")) or source.lower().endswith(_FILE_SUFFIXES)
    absolute = Path(os.path.normpath(folder / path))
    return str(absolute) if like_path or absolute.exists() else source


def _fault(details: ErrorDetails, where: str, lines: Mapping[str, int]) -> str:
    """One line about one fault: `fleet.yaml:4: models[0].dtype: ...; got 'fp8'`."""
    kind, context = details["type"], details.get("ctx", {})
    # Unions add their branch's name to the location.
    location = [part for part in details["loc"] if part not in ("int", "float", "str")]
    key = _key_path(location)
    numbers = {name: f"{v:g}" if isinstance(v, float) else v for name, v in context.items()}
    message = _MESSAGES[kind].format_map(numbers) if kind in _MESSAGES else details["msg"]
    if kind == "extra_forbidden":
        text = f"{key}: unknown key{_nearest(str(location[-1]), _keys_beside(location))}"
    elif kind == "missing":
        text = f"{key}: missing"
    elif kind == "literal_error":
        choices = re.sub("'", "", str(context["expected"]))
        text = f"{key}: unknown value; got {_shown(details['input'])}, choose {choices}"
    elif kind in ("missing_config", "surplus_config", "cluster", "pinned"):
        text = f"{key}: {message}"
    elif kind in ("duplicate_name", "floors"):
        key, text = message.split(":", 1)[0], message
    elif kind in ("model_type", "dict_type") and location and location[-1] == "config":
        text = f"{key}: must be a mapping; got {_shown(details['input'])}"
    else:
        text = f"{key}: {message}; got {_shown(details['input'])}"
    line = _line_of(key, lines)
    prefix = f"{where}:{line}: " if where and line else f"{where}: " if where else ""
    return prefix + text


_MESSAGES = {
    "string_type": "must be text (quote it if it looks like something else)",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must not contain spaces or control characters",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "too_short": "must not be empty",
    "model_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "invalid_key": "a key must be text",
}


def _key_path(location: Iterable[int | str]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _keys_beside(location: list[int | str]) -> list[str]:
    """The keys that are known where the last part of `location` stands."""
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


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _shown(value: object) -> str:
    """A value as it may stand in a message: short, and in YAML's words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line_of(key: str, lines: Mapping[str, int]) -> int | None:
    """The line of the key, or of the nearest enclosing one that is in the file."""
    while key and key not in lines:
        cut = max(key.rfind("."), key.rfind("["))
        key = key[:cut] if cut > 0 else ""
    return lines.get(key)
