"""The entry of one model in the fleet file. Imports no JAX."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from muxjax.config.section import Positive, Section, null_is_empty
from muxjax.errors import FleetConfigError
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.specs import DEFAULT_SCALE, LatencySlo

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\s\x00-\x1f]+$")]


class SloConfig(Section):
    """Latency targets of a model, in seconds."""

    ttft: Positive | None = Field(
        default=None, description="Time to first token, mean, in seconds; by default no target."
    )
    tpot: Positive | None = Field(
        default=None,
        description="Time per output token after the first, mean, in seconds; by default no "
        "target.",
    )
    scale: Positive = Field(
        default=DEFAULT_SCALE,
        description="For latencies without a target: the target of the slo policy, as a multiple "
        "of the latency of an isolated request.",
    )

    @property
    def latency_slo(self) -> LatencySlo:
        """The targets as the scheduler, planner and server use them."""
        return LatencySlo(self.ttft, self.tpot, self.scale)


class ModelEntry(Section):
    """One model of the fleet and its expected load."""

    name: Name = Field(description="Name of the model in requests.")
    source: Annotated[str, Field(min_length=1)] = Field(
        description="GGUF file, Hugging Face or MuxJAX folder, Hub id (org/name), demo:NAME, or "
        "config:FAMILY for random weights. Paths are relative to the fleet file."
    )
    config: dict[str, Any] | None = Field(
        default=None,
        description="Architecture of a config:FAMILY source, with the keys of Hugging Face's "
        "config.json.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision of weights and KV cache; auto is the fastest one of the device.",
    )
    quantization: Literal["none", "int8"] = Field(
        default="none",
        description="int8: weight matrices and the activations they multiply are quantized to 8 "
        "bits. A quarter of the float32 memory; on a CPU the fastest for two or more requests at "
        "once.",
    )
    rate: Positive = Field(default=1.0, description="Expected requests per second.")
    prompt_tokens: Positive = Field(
        default=161.0, description="Expected mean prompt length, in tokens (161: ShareGPT)."
    )
    output_tokens: Positive = Field(
        default=338.0, description="Expected mean output length, in tokens (338: ShareGPT)."
    )
    max_model_len: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Maximum number of tokens of prompt and output; by default the model's limit.",
    )
    kv_floor: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Fraction of the pool that is reserved for this model; by default computed "
        "from the rates and lengths.",
    )
    slo: Annotated[SloConfig, null_is_empty] = Field(
        default_factory=SloConfig, description="Latency targets."
    )
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None,
        description="Number of devices that one replica of the model is sharded over; must divide "
        "the fleet's tensor_parallel, which is the default. With fewer devices there are replicas.",
    )
    profile: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Name of this model in a profile of step times; by default its name.",
    )
    pinned: bool = Field(default=False, description="Never put the model to sleep.")
    idle_timeout: Positive | None = Field(
        default=None,
        description="Idle time in seconds after which the model is put to sleep; by default the "
        "fleet's idle_timeout.",
    )
    sleeping: bool = Field(
        default=False,
        description="Do not load the model at start: the first request loads it, and waits for "
        "that.",
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
        is_random = self.source.startswith("config:")
        if is_random and not self.config:
            raise PydanticCustomError(
                "missing_config",
                "the source {source} needs a config: mapping",
                {"source": self.source},
            )
        if not is_random and self.config is not None:
            raise PydanticCustomError(
                "surplus_config",
                "config: is only for config:FAMILY sources; {source} has its own",
                {"source": self.source},
            )
        return self

    @property
    def expected_load(self) -> ExpectedLoad:
        """Rate and mean lengths as the scheduler and planner use them."""
        return ExpectedLoad(self.rate, self.prompt_tokens, self.output_tokens)

    def check_length(self, max_position: int) -> None:
        """Checks that the length limit is within the model's context length.

        Args:
          max_position: context length of the model, in tokens.

        Raises:
          FleetConfigError: `max_model_len` is longer than the context.
        """
        if self.max_model_len is not None and self.max_model_len > max_position:
            raise FleetConfigError(
                f"max_model_len of {self.name} is {self.max_model_len}; the model's context "
                f"length is {max_position}"
            )
