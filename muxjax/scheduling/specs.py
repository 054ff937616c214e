"""The scheduler's description of a model: shape in the pool, limits, expected load and demand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from muxjax.scheduling.expected_load import ExpectedLoad


@dataclass(frozen=True, slots=True)
class BucketLimits:
    """Largest steps that are compiled for a model.

    Attributes:
      max_seqs: number of device slots, so the maximum number of sequences at once.
      max_prefill_tokens: maximum number of tokens in a prefill step, over all chunks.
      max_prefill_seqs: maximum number of chunks in a prefill step.
      max_decode_tokens: maximum number of tokens (`k`) that a decode step generates for each
        sequence.
    """

    max_seqs: int = 16
    max_prefill_tokens: int = 512
    max_prefill_seqs: int = 8
    max_decode_tokens: int = 8

    def __post_init__(self) -> None:
        for name in ("max_seqs", "max_prefill_tokens", "max_prefill_seqs", "max_decode_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def part_prefill_tokens(self) -> int:
        """The smaller size that prefills are compiled for: a quarter, but at least 16."""
        return min(self.max_prefill_tokens, max(16, self.max_prefill_tokens // 4))


DEFAULT_SCALE = 8.0
"""Latency allowed where no target is set, in multiples of the isolated latency (as in MuxServe)."""


@dataclass(frozen=True, slots=True)
class LatencySlo:
    """Latency targets of a model's requests, which the `slo` policy aims to meet.

    A target that is not set is `scale` times the isolated latency. Without `ttft` and `tpot` there
    is one target for the whole request: a request that decodes faster may wait longer.

    Attributes:
      ttft: time to first token, in seconds.
      tpot: time per output token after the first, in seconds.
      scale: multiple of the isolated latency, for targets that are not set.
      isolated_ttft, isolated_tpot: isolated latency of a mean request, in seconds; None: estimated
        from the unit's steps.
    """

    ttft: float | None = None
    tpot: float | None = None
    scale: float = DEFAULT_SCALE
    isolated_ttft: float | None = None
    isolated_tpot: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot", "scale", "isolated_ttft", "isolated_tpot"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"the latency target {name} must be above 0, not {value}")

    def met_by(self, ttft: float, tpot: float | None) -> bool:
        """Whether latencies in seconds are within `ttft` and `tpot`, where these are given.

        Args:
          ttft: time to first token.
          tpot: time per output token after the first; None for a request of one token.
        """
        if self.ttft is not None and ttft > self.ttft:
            return False
        return self.tpot is None or tpot is None or tpot <= self.tpot


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model of a unit as the scheduler sees it.

    Attributes:
      name: unique in the unit.
      num_layers: `L`, pages in a block.
      tokens_per_page: tokens that a page, and so a block, holds.
      max_model_len: maximum number of tokens of prompt and output together.
      limits: largest compiled steps.
      load: expected rate and lengths of its requests.
      kv_floor: part of the pool (0 to 1) that is guaranteed to the model; None: computed.
      targets: latency targets of its requests.
      replicas: replicas on the devices of the unit; slot `s` belongs to replica `s % replicas`.
    """

    name: str
    num_layers: int
    tokens_per_page: int
    max_model_len: int
    limits: BucketLimits = field(default_factory=BucketLimits)
    load: ExpectedLoad = field(default_factory=ExpectedLoad)
    kv_floor: float | None = None
    targets: LatencySlo = LatencySlo()
    replicas: int = 1

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.tokens_per_page < 1:
            raise ValueError(f"{self.name}: num_layers and tokens_per_page must be at least 1")
        if self.max_model_len < 2:
            raise ValueError(
                f"{self.name}: max_model_len must allow a prompt token and an output token, "
                f"not {self.max_model_len}"
            )
        if self.kv_floor is not None and not 0 <= self.kv_floor <= 1:
            raise ValueError(f"{self.name}: kv_floor must be from 0 to 1, not {self.kv_floor}")

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold this many tokens."""
        return -(-num_tokens // self.tokens_per_page)


@dataclass(frozen=True, slots=True)
class Demand:
    """Expected demand of a model; see `demand.expected_demand`.

    Attributes:
      kv: demand for pages, in any unit that is the same for all models. KV quotas follow it.
      prefill_seconds: device seconds of prefill per second.
      decode_seconds: device seconds of decode per second.
    """

    kv: float
    prefill_seconds: float
    decode_seconds: float
